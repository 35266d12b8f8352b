"""GroupNorm as compiled graphs want it: every sum in two stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowwiseGroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that adds up within rows first, then over the rows of a group.

        μ = mean μ_r,  σ² = mean σ_r² + mean (μ_r − μ)²,  y = (x − μ)/√(σ² + ε) · w + b

    A group of an image is few, long sums: one for each image and group, each of C/G · H · W
    numbers, strided where channels come last. Inductor gives each to one thread block, and a GPU
    stands idle. Rows of W numbers are many short sums, and whatever is broadcast goes over the
    rows too, so that the backward adds up in the same two stages. Only input [N, C, H, W] is
    computed in this way.
    """

    def forward(self, input: Tensor) -> Tensor:
        """y [N, C, H, W], of the dtype that `torch.nn.functional.group_norm` returns."""
        if input.ndim != 4:
            return super().forward(input)
        batch, channels, height, _ = input.shape
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        row_variance, row_mean = torch.var_mean(x, dim=-1, correction=0)  # [N, C, H]
        grouped = (batch, self.num_groups, -1)
        means = row_mean.reshape(grouped)
        mean = means.mean(-1, keepdim=True)  # [N, G, 1]
        variance = row_variance.reshape(grouped).mean(-1, keepdim=True)
        variance = variance + (means - mean).square().mean(-1, keepdim=True)
        inverse = (variance + self.eps).rsqrt()

        def of_rows(values: Tensor) -> Tensor:
            """[N, G, 1] or [C] as [N, C, H, 1]."""
            if values.ndim == 3:
                values = values.expand(batch, self.num_groups, channels // self.num_groups)
                values = values.reshape(batch, channels)
            return values.reshape(-1, channels, 1).expand(batch, channels, height)[..., None]

        y = (x - of_rows(mean)) * of_rows(inverse)
        if self.affine:
            y = y * of_rows(self.weight) + of_rows(self.bias)
        # autocast has group norms in float32 on a GPU, and leaves them alone on a CPU
        if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            return y
        return y.to(input.dtype)


def by_rows(model: nn.Module) -> None:
    """Let every GroupNorm of a model be computed by rows; its parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = RowwiseGroupNorm
