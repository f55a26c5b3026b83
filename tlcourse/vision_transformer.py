"""torchvision's vision transformer with the same weights and outputs, computed faster."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, VisionTransformer


class SelfAttention(nn.MultiheadAttention):
    """Self-attention alone (Vaswani et al. 2017, section 3.2.2, arXiv:1706.03762), batch first.

    torch's own forward pass copies queries, keys and values into another order on the way. Here
    one product gives all three, and they are only looked at in the order that attention takes.
    """

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """(B, T, E) -> (B, T, E), and None in the place of the attention weights."""
        batch, length, width = query.shape
        joint = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 E)
        parts = joint.view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, heads, T, E / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None


class HalfResidualEncoder(Encoder):
    """Under autocast, the sum that runs through all layers is in half precision, too.

    Autocast alone leaves it in float32, as the positions are, and every layer then moves twice
    the bytes. Without autocast nothing changes.
    """

    def forward(self, input: Tensor) -> Tensor:  # (B, T, E) -> (B, T, E)
        embedded = input + self.pos_embedding
        if torch.is_autocast_enabled(input.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(input.device.type))
        return self.ln(self.layers(self.dropout(embedded)))


class PatchProduct(nn.Conv2d):
    """The patch embedding, a convolution whose stride is its kernel, as one matrix product."""

    def forward(self, input: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, E, H / p, W / p)
        size = self.kernel_size[0]
        batch, channels, height, width = input.shape
        rows, columns = height // size, width // size
        patches = input.reshape(batch, channels, rows, size, columns, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)  # (B, T, E)
        return embedded.transpose(1, 2).reshape(batch, -1, rows, columns)


def speed_up(model: VisionTransformer) -> VisionTransformer:
    """Give the parts of a torchvision ViT the forward passes above, in place.

    Parameters, their names and the state dict stay as they are.

    Raises:
        ValueError: if attention has dropout, which ``SelfAttention`` leaves out.
    """
    # The parts keep their parameters and hooks; only their class, and with it the forward pass,
    # is another.
    for part in model.modules():
        if type(part) is nn.MultiheadAttention:
            if part.dropout > 0:
                raise ValueError(f"attention dropout must be 0, got {part.dropout}")
            part.__class__ = SelfAttention
        elif type(part) is Encoder:
            part.__class__ = HalfResidualEncoder
    if type(model.conv_proj) is nn.Conv2d and model.conv_proj.stride == model.conv_proj.kernel_size:
        model.conv_proj.__class__ = PatchProduct
    return model
