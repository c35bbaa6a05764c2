"""A trunk without BatchNorm gives what it gave with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sela_cli.folding import folded
from sela_cli.networks import ARCHS, build
from sela_cli.precision import autocast

SIDE = 32


def lived_in(arch: str) -> nn.Module:
    """A trunk whose norms have statistics, scales and shifts of their own."""
    trunk = build(arch, SIDE, [2], seed=0).trunk
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_var, module.weight):
                assert values is not None
                values.data.uniform_(0.5, 1.5, generator=generator)
            for values in (module.running_mean, module.bias):
                assert values is not None
                values.data.normal_(0, 0.1, generator=generator)
    return trunk.eval()


def views() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_outputs_are_the_same_and_the_trunk_is_left_alone(arch: str) -> None:
    trunk, view = lived_in(arch).double(), views().double()
    before = copy.deepcopy(trunk.state_dict())
    torch.testing.assert_close(folded(trunk, "float32")(view), trunk(view), rtol=1e-9, atol=1e-9)
    after = trunk.state_dict()
    assert all(torch.equal(values, after[name]) for name, values in before.items())


@pytest.mark.parametrize("arch", sorted(set(ARCHS) - {"resnet50-v2"}))
def test_no_norm_is_left_where_each_comes_after_a_convolution(arch: str) -> None:
    with torch.device("meta"):
        trunk = folded(build(arch, SIDE, [2], seed=0).trunk, "float32")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18", "resnet50-v2"])
@torch.no_grad()
def test_in_bfloat16_it_is_no_further_from_float32_than_the_trunk_is(arch: str) -> None:
    trunk, view = lived_in(arch), views()
    exact = trunk(view)
    with autocast("cpu", "bfloat16"):
        errors = [(module(view) - exact).norm() for module in (folded(trunk, "bfloat16"), trunk)]
    assert 0 < errors[0] < 1.25 * errors[1] < 0.1 * exact.norm()
