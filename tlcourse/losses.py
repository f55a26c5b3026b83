"""What is added to the cross-entropy, or takes its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tlcourse.freezing import head_name


class L2SP:
    """The L2-SP penalty: a spring from each backbone weight to its pre-trained value.

    Li, Grandvalet, Davoine 2018, equation 2, arXiv:1802.01483:
    ``alpha / 2 * ||w - w_0||^2 + beta / 2 * ||w_head||^2``. As there, w_0 is the starting
    point, and biases and the scales of normalisation layers are held too. Use it with
    ``weight_decay=0``, which would pull to zero what this pulls to w_0:

        config = tl.TrainConfig(lr=1e-3, num_steps=60, weight_decay=0, penalty=L2SP(model, 0.01))

    Args:
        model: in the state to stay close to; its trainable parameters are copied now.
        alpha: strength for what is not the head, >= 0.
        beta: strength for the head (``tlcourse.freezing.head_name``), which has no pre-trained
            value, >= 0.

    Raises:
        ValueError: if a strength is negative.
    """

    def __init__(self, model: nn.Module, alpha: float, beta: float = 0.0) -> None:
        for name, strength in (("alpha", alpha), ("beta", beta)):
            if not strength >= 0:
                raise ValueError(f"{name} must be >= 0, got {strength}")
        self.alpha, self.beta = alpha, beta
        head = head_name(model)
        self.start: dict[str, Tensor | None] = {
            name: None
            if head is not None and name.startswith(head + ".")
            else parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty at the model's present weights, a scalar.

        Raises:
            KeyError: if the model has a trainable parameter that was not there, or not
                trainable, at the start.
        """
        total = torch.zeros((), device=next(model.parameters()).device)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in self.start:
                raise KeyError(f"parameter {name!r} was not trainable when L2SP was made")
            start = self.start[name]
            if start is None:
                total = total + self.beta / 2 * parameter.square().sum()
            else:
                total = total + self.alpha / 2 * (parameter - start).square().sum()
        return total

    def __repr__(self) -> str:
        return f"L2SP(alpha={self.alpha}, beta={self.beta})"
