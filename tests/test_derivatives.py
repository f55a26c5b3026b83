"""Finite differences against autograd."""

import pytest
import torch

from tlcourse.derivatives import finite_differences


def test_slopes_are_those_of_autograd_and_theta_is_put_back():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    before = theta.clone()
    slopes = finite_differences(lambda: (theta.sin() * theta.exp()).sum(), theta)
    leaf = theta.clone().requires_grad_()
    (leaf.sin() * leaf.exp()).sum().backward()
    torch.testing.assert_close(slopes, leaf.grad, rtol=1e-7, atol=1e-8)
    assert torch.equal(theta, before)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"theta must be float64, got torch\.float32"):
        finite_differences(lambda: torch.zeros(()), torch.zeros(2))
    with pytest.raises(ValueError, match="step must be > 0, got 0"):
        finite_differences(lambda: torch.zeros(()), torch.zeros(2, dtype=torch.float64), 0)
