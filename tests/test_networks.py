"""Networks: shapes and parameter counts by closed form or by torchvision's, weights by seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from sela_cli.batchwide import Dropout
from sela_cli.errors import BadData, UsageError
from sela_cli.networks import (
    ARCHS,
    Network,
    PreactBottleneck,
    PreactResNet50,
    build,
    parse_heads,
)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convolution(inputs: int, outputs: int, kernel: int) -> int:
    """Without bias."""
    return inputs * outputs * kernel**2


def norm(channels: int) -> int:
    return 2 * channels


def plan(arch: str, size: int, heads: list[int]) -> Network:
    """A network without memory or values: shapes only, at once."""
    with torch.device("meta"):
        return build(arch, size, heads, seed=0).eval()


def blank(size: int, count: int = 1) -> torch.Tensor:
    return torch.zeros(count, 3, size, size, device="meta")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [16, 32, 64, 224])
def test_output_shapes(arch: str, size: int) -> None:
    network = plan(arch, size, [7, 3])
    assert network.trunk(blank(size, 2)).shape == (2, network.width)
    assert [tuple(logits.shape) for logits in network(blank(size, 2))] == [(2, 7), (2, 3)]


@pytest.mark.parametrize("arch", ["alexnet", "alexnet-small"])
@pytest.mark.parametrize("size", [65, 96, 128, 192, 256, 448])
def test_alexnet_at_any_size_works_or_is_refused(arch: str, size: int) -> None:
    try:
        network = plan(arch, size, [5])
    except UsageError:
        return
    assert network(blank(size))[0].shape == (1, 5)


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18"])
def test_logits_are_linear_in_the_features(arch: str) -> None:
    network = build(arch, 32, [7, 3], seed=0).eval()
    view = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = network.trunk(view), network(view)
    assert not torch.allclose(features[0], features[1])
    for tensor, (weight_KD, bias_K) in zip(logits, network.head_arrays(), strict=True):
        expected = features.numpy() @ weight_KD.T + bias_K
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_layers_run_in_their_order(arch: str) -> None:
    network = plan(arch, 32, [2])
    seen = []
    for name, module in network.layers().items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    network(blank(32))
    assert seen == list(network.layers()) and len(seen) >= 4


# ---- AlexNet ----------------------------------------------------------------


def test_alexnet_is_the_papers() -> None:
    """96-256-384-384-256 filters with BatchNorm, two layers of 4096, on 224 pixels."""
    filters, kernels = (96, 256, 384, 384, 256), (11, 5, 3, 3, 3)
    sides = (55, 27, 13, 13, 13)
    network = plan("alexnet", 224, [3000])
    shapes = {}
    for name, module in network.layers().items():
        module.register_forward_hook(
            lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    network.trunk(blank(224))
    assert list(shapes.values()) == [
        (1, count, side, side) for count, side in zip(filters, sides, strict=True)
    ]
    trunk = sum(
        convolution(inputs, outputs, kernel) + norm(outputs)
        for inputs, outputs, kernel in zip((3, *filters), filters, kernels, strict=False)
    )
    trunk += 256 * 6 * 6 * 4096 + 4096 + 4096 * 4096 + 4096
    assert parameters(network.trunk) == trunk
    assert parameters(network) == trunk + 4096 * 3000 + 3000
    drops = [module.p for module in network.modules() if isinstance(module, nn.Dropout)]
    assert drops == [0.5, 0.5]


def test_alexnet_drops_out_in_training_only() -> None:
    network = build("alexnet-small", 32, [4], seed=0)
    view = torch.ones(2, 3, 32, 32)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        network.eval()
        assert torch.equal(network(view)[0], network(view)[0])
        network.train()
        assert not torch.equal(network(view)[0], network(view)[0])


# ---- ResNets ----------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_resnets_are_torchvisions_without_fc(arch: str) -> None:
    with torch.device("meta"):
        theirs = getattr(models, arch)(weights=None)
    ours = plan(arch, 224, [10])
    assert ours.width == theirs.fc.in_features
    assert parameters(ours.trunk) == parameters(theirs) - parameters(theirs.fc)
    # The stem of small images has a kernel of 3 in place of 7.
    stem = convolution(3, 64, 7) - convolution(3, 64, 3)
    assert parameters(plan(arch, 32, [10]).trunk) == parameters(ours.trunk) - stem


@pytest.mark.parametrize("arch", ["resnet18", "resnet50-v2"])
@pytest.mark.parametrize(("size", "side"), [(32, 32), (96, 24)])
def test_resnet_stems(arch: str, size: int, side: int) -> None:
    """Small images keep their resolution up to the first layer, large ones lose a factor 4."""
    network = plan(arch, size, [2])
    sides = []
    network.layers()["layer1"].register_forward_pre_hook(
        lambda _, inputs: sides.append(inputs[0].shape[-1])
    )
    network.trunk(blank(size))
    assert sides == [side]


@pytest.mark.parametrize("small", [True, False])
def test_preact_resnet50_has_the_parameters_of_its_plan(small: bool) -> None:
    total = convolution(3, 64, 3 if small else 7)
    inputs = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * planes
        # A projection to widen; no norm on it, for its input is already active.
        total += convolution(inputs, outputs, 1)
        for _ in range(blocks):
            total += norm(inputs) + convolution(inputs, planes, 1)
            total += norm(planes) + convolution(planes, planes, 3)
            total += norm(planes) + convolution(planes, outputs, 1)
            inputs = outputs
    with torch.device("meta"):
        assert parameters(PreactResNet50(small)) == total + norm(inputs)


def test_preact_identity_block_passes_negative_maps() -> None:
    """Without its branch the block is the identity: nothing is activated after the sum."""
    block = PreactBottleneck(16, 4, stride=1).eval()
    nn.init.zeros_(block.conv3.weight)
    maps = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(block(maps), maps)


def test_preact_block_normalises_and_activates_first() -> None:
    """Maps below the norm's mean are cut off before any convolution, projection included."""
    block = PreactBottleneck(8, 4, stride=2).eval()
    maps = -torch.rand(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dead = block(maps)
        assert torch.equal(dead, block(2 * maps))
        block.norm1.bias.fill_(1.5)
        assert not torch.equal(block(maps), block(2 * maps))


# ---- heads ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "heads"),
    [("128x3", [128] * 3), ("128,256", [128, 256]), ("10", [10]), ("4x2,9", [4, 4, 9])],
)
def test_parse_heads(text: str, heads: list[int]) -> None:
    assert parse_heads(text) == heads


@pytest.mark.parametrize(
    "text", ["", "x", "128x", "x10", "0x3", "-5", "128x0", "128x-1", "1x2x3", "8,,9", "8.5", "ten"]
)
def test_bad_heads(text: str) -> None:
    with pytest.raises(UsageError, match="128x10"):
        parse_heads(text)


# ---- weights ----------------------------------------------------------------


def test_unknown_arch_and_heads_are_refused() -> None:
    with pytest.raises(UsageError, match="alexnet-small"):
        build("lenet", 32, [3], seed=0)
    for heads in ([], [3, 0]):
        with pytest.raises(UsageError, match="cluster"):
            build("alexnet-small", 32, heads, seed=0)


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18"])
def test_weights_are_a_function_of_the_seed(arch: str) -> None:
    def weights(seed: int) -> dict[str, np.ndarray]:
        return build(arch, 32, [6], seed, rotation=True).arrays()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    random = [name for name in first if first[name].ndim > 1]
    assert random and all(not np.array_equal(first[name], other[name]) for name in random)


def test_arrays_round_trip() -> None:
    one, two = (build("resnet18", 32, [6, 2], seed, rotation=True) for seed in (1, 2))
    one.trunk.bn1.running_mean.fill_(3.0)
    two.load_arrays({name: array.copy() for name, array in one.arrays().items()}, "a.h5")
    state = two.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in one.state_dict().items())


def other_network(kind: str) -> Network:
    if kind == "arch":
        return build("alexnet", 32, [6], seed=0)
    if kind == "heads":
        return build("alexnet-small", 32, [7], seed=0)
    if kind == "more heads":
        return build("alexnet-small", 32, [6, 6], seed=0)
    return build("alexnet-small", 32, [6], seed=0, rotation=True)


@pytest.mark.parametrize("kind", ["arch", "heads", "more heads", "rotation"])
def test_arrays_of_another_network_are_refused(kind: str) -> None:
    network = build("alexnet-small", 32, [6], seed=0)
    with pytest.raises(BadData, match=r"a\.h5.*alexnet-small"):
        network.load_arrays(other_network(kind).arrays(), "a.h5")
    with pytest.raises(BadData, match=r"a\.h5"):
        other_network(kind).load_arrays(network.arrays(), "a.h5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_half_whatever_the_place(dtype: torch.dtype) -> None:
    """Eight neighbours share a random word: each place, and each pair, is a fair coin."""
    torch.manual_seed(0)
    values = torch.ones(1, 80_003, dtype=dtype, requires_grad=True)
    dropped = Dropout(0.5)(values)
    assert set(dropped.detach().unique().tolist()) == {0.0, 2.0}
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())
    kept = (dropped[0, :80_000].detach() > 0).double().view(-1, 8)
    # Five standard deviations of 10,000 coins.
    assert ((kept.mean(0) - 0.5).abs() < 0.025).all()
    assert ((kept.T @ kept / len(kept))[~torch.eye(8, dtype=torch.bool)] - 0.25).abs().max() < 0.022
    assert torch.equal(Dropout(0.5).eval()(values), values)


def test_dropout_of_a_part_is_that_part_of_the_whole() -> None:
    whole, part = Dropout(0.5), Dropout(0.5)
    part.rows_n, part.total = torch.tensor([1, 4]), 6
    values = torch.randn(6, 10)
    torch.manual_seed(3)
    expected = whole(values)[[1, 4]]
    torch.manual_seed(3)
    assert torch.equal(part(values[[1, 4]]), expected)
