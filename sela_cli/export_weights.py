"""A checkpoint's trunk for other programs: safetensors of torch's names, or ONNX.

n images of a batch, R side of the network's input, D features.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sela_cli import extras, outputs
from sela_cli.errors import UsageError
from sela_cli.formats import Checkpoint
from sela_cli.images.augment import MEAN, STD
from sela_cli.networks import Network

SUFFIXES = (".safetensors", ".onnx")
# The newest that both of torch's exporters write without a conversion.
_OPSET = 18


def export_stage(
    network: Network, checkpoint: Checkpoint, output: str, force: bool = False
) -> dict[str, Any]:
    """Write the trunk; returns what the file says of it, where all values are strings.

    `.safetensors` holds the state dict: a ResNet's has torchvision's names without `fc`.
    `.onnx` maps `image` (n, 3, R, R), normalised, to `features` (n, D), for any n.
    Raises UsageError for another ending, MissingExtra where the extra `onnx` is missing.
    """
    outputs.check_output(output, force)
    network.eval()
    facts = _facts(network, checkpoint)
    suffix = Path(output).suffix
    if suffix == ".safetensors":
        from safetensors.torch import save

        state = {name: tensor.contiguous() for name, tensor in network.trunk.state_dict().items()}
        with outputs.replacing(output, force) as partial:
            # Not save_file, whose errors of a full disk are no OSErrors.
            partial.write_bytes(save(state, _as_text(facts)))
    elif suffix == ".onnx":
        model = _onnx_of(network)
        for name, value in _as_text(facts).items():
            model.metadata_props.add(key=name, value=value)
        with outputs.replacing(output, force) as partial:
            partial.write_bytes(model.SerializeToString())
    else:
        raise UsageError(f"{output}: the ending says the format, one of {', '.join(SUFFIXES)}")
    return facts


def _facts(network: Network, checkpoint: Checkpoint) -> dict[str, Any]:
    """What a user of the file has to know of the network and its input."""
    return {
        "arch": network.arch,
        "image-size": network.image_size,
        "features": network.width,
        "mean": MEAN,
        "std": STD,
        "checkpoint": checkpoint.header.digest if checkpoint.header else "",
    }


def _as_text(facts: dict[str, Any]) -> dict[str, str]:
    return {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in facts.items()
    }


def _onnx_of(network: Network) -> Any:
    """The trunk as a checked ONNX model."""
    extras.require("onnx")
    import onnx

    view = torch.zeros(2, 3, network.image_size, network.image_size)
    program = torch.onnx.export(
        _with_fixed_pooling(network.trunk, view),
        (view,),
        input_names=["image"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("n")},),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    return model


class FixedMaxPool(nn.Module):
    """AdaptiveMaxPool2d for maps of one known side, of operations that ONNX has."""

    def __init__(self, side: int, outputs: int) -> None:
        super().__init__()
        self.windows = [
            (number * side // outputs, -(-(number + 1) * side // outputs))
            for number in range(outputs)
        ]

    def forward(self, maps: Tensor) -> Tensor:
        rows = torch.stack([maps[:, :, a:b].amax(2) for a, b in self.windows], 2)
        return torch.stack([rows[..., a:b].amax(3) for a, b in self.windows], 3)


@torch.no_grad()
def _with_fixed_pooling(trunk: nn.Module, view: Tensor) -> nn.Module:
    trunk = copy.deepcopy(trunk).cpu().eval()
    sides: dict[str, int] = {}
    adaptive = {
        name: module
        for name, module in trunk.named_modules()
        if isinstance(module, nn.AdaptiveMaxPool2d)
    }
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: sides.update({name: inputs[0].shape[-1]})
        )
        for name, module in adaptive.items()
    ]
    trunk(view)
    for hook in hooks:
        hook.remove()
    for name, module in adaptive.items():
        assert isinstance(module.output_size, int)
        trunk.set_submodule(name, FixedMaxPool(sides[name], module.output_size))
    return trunk
