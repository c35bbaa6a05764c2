"""A convolution whose weight's gradient is one product of matrices where that is faster.

n images, I and O channels in and out, H x W maps, K positions of the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sela_cli.machine import has_matrix_units

# Of maps that large at most oneDNN adds up the gradient many times slower than it multiplies.
_SIDE = 8


class Conv2d(nn.Conv2d):
    """(n, I, H, W) -> (n, O, H', W'), as torch's; without bias, groups or dilation."""

    def forward(self, maps: Tensor) -> Tensor:
        """See torch's."""
        small = max(maps.shape[2:]) // self.stride[0] <= _SIDE
        on_cpu = maps.device.type == "cpu" and maps.dtype == torch.bfloat16
        if not (small and on_cpu and has_matrix_units()):
            return super().forward(maps)
        weight, padding = self.weight.to(maps.dtype), int(self.padding[0])
        found: Tensor = _ByProduct.apply(maps, weight, self.stride[0], padding)
        return found


class _ByProduct(torch.autograd.Function):
    """torch's convolution with a gradient of its own for the weight."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(maps, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (maps, weight), (gradient,) = ctx.saved_tensors, gradients
        strides, paddings = [ctx.stride] * 2, [ctx.padding] * 2
        wanted = [ctx.needs_input_grad[0], False, False]
        of_maps, _, _ = torch.ops.aten.convolution_backward(
            gradient, maps, weight, None, strides, paddings, [1, 1], False, [0, 0], 1, wanted
        )
        by_channel = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        seen = _seen(maps, weight.shape[2], ctx.stride, ctx.padding, gradient.shape[2:])
        of_weight = (by_channel.T @ seen).view(len(weight), *weight.shape[2:], -1)
        return of_maps, of_weight.permute(0, 3, 1, 2), None, None


def _seen(maps: Tensor, kernel: int, stride: int, padding: int, sides: torch.Size) -> Tensor:
    """What the kernel sees at each place: (n H' W', K I)."""
    padded = functional.pad(maps, (padding,) * 4).permute(0, 2, 3, 1)
    height, width = (side * stride for side in sides)
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride].flatten(0, 2)
        for row in range(kernel)
        for column in range(kernel)
    ]
    return torch.cat(shifted, 1)
