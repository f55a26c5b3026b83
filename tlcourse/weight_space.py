"""Models as points: lines between them, averages of them (soups)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]


def interpolate(theta_a: StateDict, theta_b: StateDict, alpha: float) -> dict[str, Tensor]:
    """Point on the line between two models of one architecture.

    Wortsman et al. 2022 (WiSE-FT), section 3, arXiv:2109.01903. There ``theta_a`` is the
    zero-shot model and ``theta_b`` the fine-tuned one.

    Args:
        theta_a: state dict at ``alpha=0``; tensors of any shape.
        theta_b: state dict at ``alpha=1``; same keys and shapes.
        alpha: in [0, 1]; values outside extrapolate and are refused.

    Returns:
        A new state dict. Integer tensors (BatchNorm's counters) are those of the nearer end.

    Raises:
        ValueError: if keys or shapes differ (names the first), or alpha is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    return _combine([theta_a, theta_b], [1 - alpha, alpha])


def average(thetas: Sequence[StateDict]) -> dict[str, Tensor]:
    """Uniform soup: the mean of the weights of several fine-tuned models.

    Wortsman et al. 2022 (Model soups), section 2, arXiv:2203.05482.

    Args:
        thetas: at least one state dict; same keys and shapes.

    Raises:
        ValueError: if there is none, or keys or shapes differ.
    """
    if not thetas:
        raise ValueError("average needs at least one state dict, got none")
    return _combine(thetas, [1 / len(thetas)] * len(thetas))


def greedy_soup(
    thetas: Sequence[StateDict], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """Greedy soup: take in one model after another, from the best down, if it does no harm.

    Wortsman et al. 2022 (Model soups), recipe 1, arXiv:2203.05482.

    Args:
        thetas: at least one state dict; same keys and shapes.
        score: of a state dict, higher is better; read it off validation data.

    Returns:
        The soup, and the indices of its ingredients in the order in which they went in.

    Raises:
        ValueError: as for ``average``.
    """
    alone = [score(average([theta])) for theta in thetas]
    chosen: list[int] = []
    soup, best = average(thetas[:1]), float("-inf")
    for index in sorted(range(len(thetas)), key=lambda i: -alone[i]):
        trial = average([thetas[i] for i in (*chosen, index)])
        reached = score(trial)
        if reached >= best:
            chosen, soup, best = [*chosen, index], trial, reached
    return soup, chosen


def _combine(thetas: Sequence[StateDict], shares: Sequence[float]) -> dict[str, Tensor]:
    first = thetas[0]
    for theta in thetas[1:]:
        for key in sorted(first.keys() ^ theta.keys()):
            raise ValueError(f"both models must have the same keys; only one has {key!r}")
        for key, tensor in first.items():
            if tensor.shape != theta[key].shape:
                raise ValueError(
                    f"{key!r} must have one shape in all models, got {tuple(tensor.shape)} "
                    f"and {tuple(theta[key].shape)}"
                )
    nearest = max(range(len(shares)), key=lambda i: shares[i])
    combined = {}
    for key, tensor in first.items():
        if not tensor.is_floating_point():
            combined[key] = thetas[nearest][key].detach().clone()
            continue
        total = torch.zeros_like(tensor)
        for theta, share in zip(thetas, shares, strict=True):
            total += share * theta[key].detach()
        combined[key] = total
    return combined
