"""Interpolation and soups, against algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tlcourse.weight_space import average, greedy_soup, interpolate


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    for _ in range(seed):
        model(torch.randn(8, 3))
    return model.state_dict()


def test_ends_middle_and_linearity() -> None:
    a, b = state(0), state(3)
    for key in a:
        torch.testing.assert_close(interpolate(a, b, 0)[key], a[key])
        torch.testing.assert_close(interpolate(a, b, 1)[key], b[key])
        torch.testing.assert_close(interpolate(a, b, 0.3)[key], interpolate(b, a, 0.7)[key])
    torch.testing.assert_close(interpolate(a, b, 0.5)["0.weight"], average([a, b])["0.weight"])
    assert interpolate(a, b, 0.6)["1.num_batches_tracked"] == b["1.num_batches_tracked"]


def test_a_linear_model_of_averages_gives_the_average_answer() -> None:
    models = [nn.Linear(3, 2) for _ in range(3)]
    soup = nn.Linear(3, 2)
    soup.load_state_dict(average([model.state_dict() for model in models]))
    x = torch.randn(5, 3)
    torch.testing.assert_close(soup(x), torch.stack([model(x) for model in models]).mean(0))


def test_the_given_models_are_left_alone() -> None:
    a, b = state(0), state(1)
    before = {key: value.clone() for key, value in a.items()}
    mixed = interpolate(a, b, 0)
    for tensor in mixed.values():
        tensor.zero_()
    assert all(torch.equal(a[key], before[key]) for key in a)


def test_greedy_soup_takes_what_helps_and_leaves_what_harms() -> None:
    thetas = [{"w": torch.tensor([x])} for x in (3.0, -1.0, 1.5, 40.0)]
    soup, chosen = greedy_soup(thetas, lambda theta: -abs(theta["w"].item() - 1.0))
    # Alone: 1.5 is nearest to 1, then 3 and -1 (a tie, the first wins), then 40.
    # 1.5 with 3 is 2.25: worse. 1.5 with -1 is 0.25: worse. So 1.5 stays alone.
    assert chosen == [2] and soup["w"].item() == 1.5
    soup, chosen = greedy_soup(thetas[:2], lambda theta: -abs(theta["w"].item() - 1.0))
    assert chosen == [0, 1] and soup["w"].item() == 1.0


def test_bad_input_is_named() -> None:
    a = state(0)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be in"):
            interpolate(a, a, alpha)
    with pytest.raises(ValueError, match=r"only one has '0\.bias'"):
        interpolate(a, {k: v for k, v in a.items() if k != "0.bias"}, 0.5)
    with pytest.raises(ValueError, match=r"'0\.bias' must have one shape .* \(4,\) and \(2,\)"):
        average([a, a | {"0.bias": torch.zeros(2)}])
    with pytest.raises(ValueError, match="got none"):
        average([])
