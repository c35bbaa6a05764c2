"""A convolution of small maps as products of matrices, where that is faster.

n images, I and O channels in and out, H x W maps, K positions of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sela_cli.machine import has_matrix_units

# Of maps that large at most oneDNN adds up the weight's gradient many times slower than it
# multiplies; of the smaller ones it leaves most of a matrix unit's rows empty in all it does.
_SIDE = 8
_TINY = 4

# Columns of zeros: rows a power of two apart would share the cache's few places. oneDNN reads
# some of them, and multiplies them by zero.
_APART = 32


class Conv2d(nn.Conv2d):
    """(n, I, H, W) -> (n, O, H', W'), as torch's; without groups or dilation."""

    def forward(self, maps: Tensor) -> Tensor:
        """See torch's."""
        small = max(maps.shape[2:]) // self.stride[0] <= _SIDE
        on_cpu = maps.device.type == "cpu" and maps.dtype == torch.bfloat16
        if not (small and on_cpu and has_matrix_units()):
            return super().forward(maps)
        weight, padding = self.weight.to(maps.dtype), int(self.padding[0])
        found: Tensor = _ByProduct.apply(maps, weight, self.stride[0], padding)
        return found if self.bias is None else found + self.bias.to(found.dtype)[:, None, None]


class _ByProduct(torch.autograd.Function):
    """torch's convolution with a gradient of its own for the weight; of tiny maps, all its own."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        kernel = weight.shape[2]
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in maps.shape[2:]]
        tiny = max(sides) <= _TINY
        seen = _seen(maps, kernel, stride, padding, sides) if tiny else None
        ctx.save_for_backward(maps, weight, seen)
        ctx.stride, ctx.padding = stride, padding
        if seen is None:
            return functional.conv2d(maps, weight, None, stride, padding)
        return _maps(seen @ weight.permute(2, 3, 1, 0).flatten(0, 2), sides)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (maps, weight, seen), (gradient,) = ctx.saved_tensors, gradients
        kernel, sides = weight.shape[2], gradient.shape[2:]
        if seen is not None and ctx.stride == 1:
            # A convolution of the gradient, by the kernel turned about and the other padding.
            around = _seen(gradient, kernel, 1, kernel - 1 - ctx.padding, maps.shape[2:])
            turned = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)
            of_maps = _maps(around @ turned, maps.shape[2:])
        else:
            strides, paddings = [ctx.stride] * 2, [ctx.padding] * 2
            wanted = [ctx.needs_input_grad[0], False, False]
            of_maps, _, _ = torch.ops.aten.convolution_backward(
                gradient, maps, weight, None, strides, paddings, [1, 1], False, [0, 0], 1, wanted
            )
        if seen is None:
            seen = _seen(maps, kernel, ctx.stride, ctx.padding, sides)
        by_channel = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        of_weight = (by_channel.T @ seen).view(len(weight), kernel, kernel, -1)
        return of_maps, of_weight.permute(0, 3, 1, 2), None, None


def _seen(maps: Tensor, kernel: int, stride: int, padding: int, sides: Sequence[int]) -> Tensor:
    """What the kernel sees at each place: (n H' W', K I)."""
    padded = functional.pad(maps.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()
    count, rows, columns, inputs = padded.shape
    # A row of the kernel is one piece of memory.
    along, down = inputs, columns * inputs
    windows = padded.as_strided(
        (count, *sides, kernel, kernel * along),
        (rows * down, stride * down, stride * along, down, 1),
    )
    width = kernel**2 * inputs
    places = maps.new_empty(count, *sides, width + _APART)
    places[..., width:] = 0
    places[..., :width].view(windows.shape).copy_(windows)
    return places.flatten(0, 2)[:, :width]


def _maps(rows: Tensor, sides: Sequence[int]) -> Tensor:
    """(n H W, channels) -> (n, channels, H, W), channels last in memory."""
    return rows.view(-1, *sides, rows.shape[1]).permute(0, 3, 1, 2)
