"""Networks: a trunk of named layers that gives features, and T linear heads over clusters.

n images, D features, K clusters of a head, T heads, S clusters of all of them. AlexNet has the
BatchNorm and the filters of the paper; ResNets are torchvision's. Every network has two stems:
for images of up to 64 pixels, and for larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sela_cli.batchwide import BatchNorm2d, Dropout
from sela_cli.convolution import Conv2d
from sela_cli.errors import BadData, UsageError
from sela_cli.formats import ARCHS
from sela_cli.images.batches import SMALL

_FILTERS = {"alexnet": (96, 256, 384, 384, 256), "alexnet-small": (64, 192, 384, 256, 256)}
_DROPOUT = 0.5


class Network(nn.Module):
    """Trunk and heads. `forward` gives the logits of each head, `trunk` the features."""

    def __init__(
        self, arch: str, image_size: int, heads: list[int], rotation: bool = False
    ) -> None:
        super().__init__()
        self.arch, self.image_size = arch, image_size
        self.clusters = heads
        self.trunk, self.width = _trunk(arch, small=image_size <= SMALL)
        self.heads = nn.ModuleList(nn.Linear(self.width, clusters) for clusters in heads)
        self.rotation = nn.Linear(self.width, 4) if rotation else None
        self.apply(_initialise)

    def forward(self, view: Tensor) -> list[Tensor]:
        """(n, 3, R, R) -> T tensors (n, K)."""
        return list(torch.split(self.logits(self.trunk(view)), self.clusters, 1))

    def logits(self, features_nD: Tensor) -> Tensor:
        """(n, D) -> (n, sum of K): those of each head beside the next one's, in one product."""
        heads = [cast(nn.Linear, head) for head in self.heads]
        weight_SD = torch.cat([head.weight for head in heads])
        bias_S = torch.cat([head.bias for head in heads])
        return functional.linear(features_nD, weight_SD, bias_S)

    def layers(self) -> dict[str, nn.Module]:
        """The layers that probes read, by name, shallow to deep."""
        return {name: self.trunk.get_submodule(name) for name in _LAYERS[self.arch]}

    def head_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weight (K, D) and bias (K,) of each head."""
        arrays = arrays_of(self.heads)
        numbers = range(len(self.clusters))
        return [(arrays[f"{number}.weight"], arrays[f"{number}.bias"]) for number in numbers]

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters and buffers by torch's names."""
        return arrays_of(self)

    def load_arrays(self, arrays: Mapping[str, np.ndarray], path: str) -> None:
        """The reverse. Raises BadData naming `path` where names or shapes differ."""
        load_arrays(self, arrays, f"{path}: does not fit network {self.arch}")


def arrays_of(module: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and buffers of any module by torch's names."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}


def load_arrays(module: nn.Module, arrays: Mapping[str, np.ndarray], complaint: str) -> None:
    """The reverse. Raises BadData with the complaint where names or shapes differ."""
    state = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise BadData(f"{complaint} ({reason})") from error


_ALEXNET_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
_RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_LAYERS = {arch: _ALEXNET_LAYERS if "alexnet" in arch else _RESNET_LAYERS for arch in ARCHS}


def check_arch(arch: str) -> None:
    """Raises UsageError where there is no such network."""
    if arch not in ARCHS:
        raise UsageError(f"--arch {arch} is none of {', '.join(ARCHS)}")


def build(
    arch: str, image_size: int, heads: list[int], seed: int, rotation: bool = False
) -> Network:
    """A freshly initialised network; the same one for the same arguments."""
    check_arch(arch)
    if not heads or min(heads) < 1:
        raise UsageError(f"--heads {heads}: every head needs at least one cluster")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(arch, image_size, heads, rotation)


def unfilled(arch: str, image_size: int, heads: list[int], rotation: bool) -> Network:
    """A network that waits for its arrays, without the time that initialising takes."""
    with torch.device("meta"):
        return Network(arch, image_size, heads, rotation).to_empty(device="cpu")


def parse_heads(text: str, option: str = "--heads") -> list[int]:
    """`128x10`: ten heads of 128 clusters; `128,256`: two heads.

    Raises UsageError, which names the `option`.
    """
    heads: list[int] = []
    for part in text.split(","):
        clusters, times, count = part.partition("x")
        try:
            heads += [int(clusters)] * (int(count) if times else 1)
        except ValueError:
            raise UsageError(f"{option} {text}: write 128x10 (K x T) or 128,256") from None
    if not heads or min(heads) < 1:
        raise UsageError(f"{option} {text}: write 128x10 (K x T) or 128,256")
    return heads


def _initialise(module: nn.Module) -> None:
    """The paper's: He for convolutions, N(0, 0.01) and no bias for linear layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def _trunk(arch: str, small: bool) -> tuple[nn.Module, int]:
    if arch in _FILTERS:
        trunk = AlexNet(_FILTERS[arch], small)
        return trunk, trunk.width
    if arch == "resnet50-v2":
        return PreactResNet50(small), 2048
    from torchvision import models

    resnet = getattr(models, arch)(weights=None, norm_layer=BatchNorm2d)
    width = resnet.fc.in_features
    resnet.fc = nn.Identity()
    # torchvision takes no other kind, as it does of norms.
    for module in resnet.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
    if small:
        resnet.conv1 = Conv2d(3, 64, 3, padding=1, bias=False)
        resnet.maxpool = nn.Identity()
    return resnet, width


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class AlexNet(nn.Module):
    """AlexNet with BatchNorm, without its last layer: (n, 3, R, R) -> (n, D).

    At 224 pixels as in the paper, D = 4096. The small form keeps the depth and the
    filters; kernels of 5 and 3 and half the strides leave a 4 x 4 map of a 32-pixel
    image, and its two fully connected layers have 1024 units.
    """

    def __init__(self, filters: tuple[int, ...], small: bool) -> None:
        super().__init__()
        one, two, three, four, five = filters
        self.width = 1024 if small else 4096
        self.conv1 = _conv(3, one, 5, 2, 2) if small else _conv(3, one, 11, 4, 2)
        self.pool1 = nn.MaxPool2d(3, 2, 1 if small else 0)
        self.conv2 = _conv(one, two, 3) if small else _conv(one, two, 5, padding=2)
        self.pool2 = nn.MaxPool2d(3, 2, 1 if small else 0)
        self.conv3 = _conv(two, three, 3)
        self.conv4 = _conv(three, four, 3)
        self.conv5 = _conv(four, five, 3)
        side = 4 if small else 6
        # Of the 13 x 13 map at 224 pixels this is the paper's pooling, 3 wide in steps of 2.
        self.pool5 = nn.AdaptiveMaxPool2d(side)
        self.fc6 = _dense(five * side * side, self.width)
        self.fc7 = _dense(self.width, self.width)

    def forward(self, view: Tensor) -> Tensor:
        maps = self.pool2(self.conv2(self.pool1(self.conv1(view))))
        maps = self.pool5(self.conv5(self.conv4(self.conv3(maps))))
        return self.fc7(self.fc6(maps.flatten(1)))


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(Dropout(_DROPOUT), nn.Linear(inputs, outputs), nn.ReLU(inplace=True))


class PreactBottleneck(nn.Module):
    """Bottleneck with BatchNorm and ReLU before each convolution (He et al. 2016)."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.norm1 = BatchNorm2d(inputs)
        self.conv1 = Conv2d(inputs, planes, 1, bias=False)
        self.norm2 = BatchNorm2d(planes)
        self.conv2 = Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.norm3 = BatchNorm2d(planes)
        self.conv3 = Conv2d(planes, outputs, 1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.norm1(maps).relu()
        # A projection sees the activated maps, an identity the raw ones.
        skipped = maps if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        active = self.conv2(self.norm2(self.conv1(active)).relu())
        return skipped + self.conv3(self.norm3(active).relu())


class PreactResNet50(nn.Module):
    """ResNet-50 v2: (n, 3, R, R) -> (n, 2048)."""

    def __init__(self, small: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(
            3, 64, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False
        )
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for number, (planes, blocks) in enumerate(
            zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)
        ):
            strides = [1 if number == 0 else 2] + [1] * (blocks - 1)
            stage = nn.Sequential()
            for stride in strides:
                stage.append(PreactBottleneck(inputs, planes, stride))
                inputs = 4 * planes
            self.add_module(f"layer{number + 1}", stage)
        self.norm = BatchNorm2d(inputs)

    def forward(self, view: Tensor) -> Tensor:
        maps = self.maxpool(self.conv1(view))
        for name in _RESNET_LAYERS:
            maps = self.get_submodule(name)(maps)
        return self.norm(maps).relu().mean((2, 3))
