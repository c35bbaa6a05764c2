"""Weights from elsewhere as a starting point: of torchvision's ResNets, or the reference code's.

D features, K clusters of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from sela_cli import formats, outputs
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, NoInput, StoppedEarly
from sela_cli.formats import Checkpoint
from sela_cli.networks import Network

# Where training scripts keep the state dict within what they save.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher", "student", "net", "network")
_PREFIXES = (
    *("module.", "_orig_mod.", "model.", "net.", "network."),
    *("backbone.", "encoder.", "encoder_q.", "base_encoder.", "trunk."),
)

# Names of the reference implementation (a Sequential of numbered layers) to ours.
_ALEXNET_STAGES = ((0, 1, "conv1"), (4, 5, "conv2"), (8, 9, "conv3"), (11, 12, "conv4"))
_ALEXNET_NAMES = [
    (rf"^features\.{number}\.", f"{ours}.{place}.")
    for conv, norm, ours in (*_ALEXNET_STAGES, (14, 15, "conv5"))
    for place, number in enumerate((conv, norm))
] + [(r"^classifier\.1\.", "fc6.1."), (r"^classifier\.4\.", "fc7.1.")]
_RESNET_NAMES = [(r"^features\.0\.", "conv1."), (r"^features\.1\.", "bn1.")] + [
    (rf"^features\.{number}\.", f"layer{number - 3}.") for number in (4, 5, 6, 7)
]


def import_stage(
    path: str, network: Network, output: str, provenance: Provenance, force: bool = False
) -> dict[str, Any]:
    """Fill the trunk of a fresh network from a weights file and write it as a checkpoint.

    The heads stay as they are. Returns how many tensors were taken and the names of those
    that were left out. Raises BadData naming what the trunk lacks.
    """
    outputs.check_output(output, force, path)
    ours, unused = fitted(read_weights(path), network, path)
    network.trunk.load_state_dict(ours)
    state = Checkpoint(
        model=network.arrays(),
        optimizer={},
        arch=network.arch,
        image_size=network.image_size,
        heads=network.clusters,
        step=0,
        epoch=0.0,
        recipe={},
    )
    formats.write_checkpoint(output, state, provenance.reading_foreign("weights", path), force)
    return {"output": output, "tensors": len(ours), "unused": unused}


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth read without running code from it.

    Raises NoInput where it is missing, BadData where it is something else.
    """
    if not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "no such file"
        raise NoInput(f"{path}: {kind}", "name a .pth or .safetensors file")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise BadData(f"{path}: not readable safetensors ({error})") from error
    if h5py.is_hdf5(path):
        raise BadData(
            f"{path} is HDF5; if it is a sela checkpoint, --checkpoint takes it as it is",
            "for fresh heads import what `sela export` makes of it",
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (StoppedEarly, MemoryError, OSError):
        # A signal may come in the middle, and a machine may fail.
        raise
    except Exception as error:
        # What is no pickle may raise anything; torch's message is a page on how to load it
        # all the same.
        raise BadData(
            f"{path}: not a file of tensors alone",
            "where you trust it, save its state_dict() as .safetensors; if it is cut short, copy "
            "it again",
        ) from error
    while isinstance(saved, Mapping):
        inner = next((saved[name] for name in _WRAPPERS if name in saved), None)
        if not isinstance(inner, Mapping):
            break
        saved = inner
    if not isinstance(saved, Mapping):
        raise BadData(f"{path} holds a {type(saved).__name__}, not a state dict")
    tensors = {str(name): item for name, item in saved.items() if isinstance(item, Tensor)}
    if not tensors:
        raise BadData(
            f"{path}: no tensor among {list(saved)[:3]}",
            "save the network's state_dict() alone",
        )
    return tensors


def fitted(
    weights: Mapping[str, Tensor], network: Network, path: str
) -> tuple[dict[str, Tensor], list[str]]:
    """What of `weights` the trunk takes, by its names, and the names of the rest.

    A convolution's bias before BatchNorm, which our networks do without, is taken off the
    running mean: the features are the same. Raises BadData where a tensor is missing, is there
    twice, has another shape or is not finite.
    """
    if not any(name.endswith("running_mean") for name in weights):
        raise BadData(
            f"{path} holds no BatchNorm, which every --arch has",
            "of torchvision's networks ResNets can be taken, and its AlexNet can't",
        )
    wanted = network.trunk.state_dict()
    named = {name: _our_name(name, network.arch) for name in weights}
    theirs: dict[str, str] = {}
    for name, our_name in named.items():
        other = theirs.setdefault(our_name, name)
        if other != name and our_name in wanted:
            raise BadData(
                f"{path}: '{other}' and '{name}' are both '{our_name}' of {network.arch}",
                "save the state_dict() of one of the two networks alone",
            )
    renamed = {our_name: weights[name] for our_name, name in theirs.items()}
    unused = [name for name, our_name in named.items() if our_name not in wanted]
    ours = {name: renamed[name] for name in wanted if name in renamed}
    for name in wanted:
        stem, _, last = name.rpartition(".")
        if last == "num_batches_tracked":
            # It plays no part in eval mode, and old files lack it.
            ours.setdefault(name, wanted[name])
        elif last == "running_mean" and name in ours:
            bias = renamed.get(_conv_before(stem) + ".bias")
            if bias is not None and _conv_before(stem) + ".bias" not in wanted:
                ours[name] = ours[name] - bias
    for name, tensor in wanted.items():
        if name not in ours:
            raise BadData(
                f"{path}: nothing for '{name}' of {network.arch} in names such as "
                f"'{(unused or list(weights))[0]}'",
                "choose the --arch it is of",
            )
        if ours[name].shape != tensor.shape:
            raise BadData(
                f"{path}: '{name}' has shape {tuple(ours[name].shape)}, {network.arch} at "
                f"{network.image_size} pixels needs {tuple(tensor.shape)}",
                "choose the --arch and --image-size it is of",
            )
        # As the network will hold it: of float64 there may be numbers beyond float32.
        if not ours[name].to(tensor.dtype).isfinite().all():
            raise BadData(
                f"{path}: '{theirs[name]}' is not finite in {tensor.dtype}",
                "import a checkpoint from before the training diverged",
            )
    _check_whole(wanted, named, network.arch, path)
    return ours, unused


def _check_whole(
    wanted: Mapping[str, Tensor], named: Mapping[str, str], arch: str, path: str
) -> None:
    """Refuse a deeper network of the same kind: what fits of it is another network."""
    parts = {name.partition(".")[0] for name in wanted}
    for name, our_name in named.items():
        part, _, rest = our_name.partition(".")
        # A bias before BatchNorm went into the running mean.
        if part in parts and rest and our_name not in wanted and not rest.endswith("bias"):
            raise BadData(
                f"{path}: '{name}' has no place in {arch}, of a deeper network perhaps",
                "choose the --arch it is of",
            )


def _our_name(name: str, arch: str) -> str:
    while prefix := next((each for each in _PREFIXES if name.startswith(each)), ""):
        name = name.removeprefix(prefix)
    for pattern, ours in _ALEXNET_NAMES if "alexnet" in arch else _RESNET_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _conv_before(norm: str) -> str:
    """`conv1.0` of `conv1.1`: AlexNet's convolutions are the only ones with a bias."""
    return re.sub(r"\.1$", ".0", norm)
