"""Convolutions of small maps as products, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sela_cli import convolution
from sela_cli.convolution import Conv2d
from sela_cli.networks import ARCHS, build

# Images, channels in and out, sides, kernel, stride, padding.
SHAPES = [
    (3, 4, 5, (4, 4), 3, 1, 1),
    (2, 3, 4, (8, 5), 3, 2, 1),
    (1, 5, 2, (7, 7), 1, 2, 0),
    (2, 2, 3, (1, 6), 1, 1, 0),
    (3, 4, 2, (1, 1), 1, 1, 0),
    (2, 2, 3, (7, 4), 5, 2, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_finite_differences(shape: tuple) -> None:  # type: ignore[type-arg]
    count, inputs, outputs, sides, kernel, stride, padding = shape
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(count, inputs, *sides, dtype=torch.float64, generator=generator)
    weight = torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64, generator=generator)
    arguments = (maps.requires_grad_(), weight.requires_grad_(), stride, padding)
    assert torch.autograd.gradcheck(convolution._ByProduct.apply, arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_is_torchs_convolution(
    shape: tuple,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As near as numbers of eight bits come to those of single precision."""
    count, inputs, outputs, sides, kernel, stride, padding = shape
    torch.manual_seed(0)
    ours = Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    maps = torch.randn(count, inputs, *sides).contiguous(memory_format=torch.channels_last)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(convolution, "has_matrix_units", lambda fast=fast: fast)
        ours.zero_grad()
        seen = (maps.bfloat16() if fast else maps).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            answer = ours(seen)
        assert answer.grad_fn is not None
        assert ("ByProduct" in answer.grad_fn.name()) == fast
        answer.float().square().sum().backward()
        assert ours.weight.grad is not None and seen.grad is not None
        found[fast] = [answer.detach().float(), ours.weight.grad.clone(), seen.grad.float()]
    for one, other in zip(found[True], found[False], strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())


@pytest.mark.parametrize("channels", [3, 5, 32])
def test_what_memory_held_before_is_not_seen(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "new_empty", lambda old, *sides: old.new_full(sides, torch.nan))
    maps = torch.ones(2, channels, 4, 4, dtype=torch.bfloat16)
    weight = torch.ones(4, channels, 3, 3, dtype=torch.bfloat16)
    answer = convolution._ByProduct.apply(maps, weight, 1, 1)
    assert torch.equal(answer, nn.functional.conv2d(maps, weight, None, 1, 1))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_network_is_made_of_it(arch: str) -> None:
    with torch.device("meta"):
        network = build(arch, 32, [2], seed=0)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert layers and all(type(module) is Conv2d for module in layers)


def test_a_bias_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Conv2d(3, 4, 3, padding=1).bfloat16()
    maps = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(convolution, "has_matrix_units", lambda fast=fast: fast)
        found[fast] = layer(maps).float()
    torch.testing.assert_close(found[True], found[False], rtol=0.02, atol=0.02)
