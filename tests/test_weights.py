"""Backbones that leave and come in: the same features on both sides, and no code run."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models
from typer.testing import CliRunner

from sela_cli import formats
from sela_cli.cli import app
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, NoInput, StoppedEarly, UsageError
from sela_cli.export_weights import FixedMaxPool, export_stage
from sela_cli.formats import Checkpoint
from sela_cli.import_weights import fitted, import_stage, read_weights
from sela_cli.networks import Network, build
from sela_cli.training import network_of


def lived_in(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and statistics as if trained: nothing is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                near_one = name.endswith("running_var") or tensor.ndim == 1
                tensor.copy_(noise + 0.5 if near_one else (noise - 0.5) * 0.1)
    return module.eval()


def save(network: Network, path: Path) -> Checkpoint:
    state = Checkpoint(
        network.arrays(), {}, network.arch, network.image_size, network.clusters, 0, 0.0, {}
    )
    formats.write_checkpoint(str(path), state, Provenance("test", {}))
    return formats.read_checkpoint(str(path))


def views(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def imported(path: Path, network: Network) -> Network:
    """Through the file that `sela import` writes."""
    output = str(path.with_name("imported.h5"))
    import_stage(str(path), network, output, Provenance("import", {}), force=True)
    return network_of(formats.read_checkpoint(output), output).eval()


# ---- export ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.safetensors", pytest.param("a.onnx", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    network = build("alexnet-small", 16, [2], seed=0)
    checkpoint = save(network, tmp_path / "c.h5")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CannotCreate, match="File too large"):
            export_stage(network, checkpoint, str(tmp_path / name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]


@torch.no_grad()
def test_a_resnet_loads_in_torchvision(tmp_path: Path) -> None:
    network = build("resnet18", 224, [5], seed=0)
    lived_in(network)
    path = tmp_path / "backbone.safetensors"
    export_stage(network, save(network, tmp_path / "c.h5"), str(path))
    theirs = models.resnet18(weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(load_file(path))
    assert torch.equal(theirs.eval()(views(2, 64)), network.trunk(views(2, 64)))


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    network = build("alexnet-small", 16, [5], seed=0)
    state = save(network, tmp_path / "c.h5")
    path = tmp_path / "backbone.safetensors"
    shown = export_stage(network, state, str(path))
    assert (shown["image-size"], shown["features"]) == (16, network.width)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert state.header and facts["checkpoint"] == state.header.digest
    assert (facts["arch"], facts["image-size"], facts["features"]) == (
        *("alexnet-small", "16"),
        str(network.width),
    )
    with pytest.raises(CannotCreate, match="--force"):
        export_stage(network, state, str(path))
    with pytest.raises(UsageError, match="safetensors"):
        export_stage(network, state, str(tmp_path / "backbone.pt"))


@pytest.mark.parametrize(("side", "outputs"), [(13, 6), (2, 4), (4, 4), (7, 3), (1, 1)])
def test_fixed_pooling_is_adaptive_pooling(side: int, outputs: int) -> None:
    maps = views(3, side)
    assert torch.equal(FixedMaxPool(side, outputs)(maps), nn.AdaptiveMaxPool2d(outputs)(maps))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18"])
def test_onnx_gives_the_same_features(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network = build(arch, 16, [5], seed=0)
    lived_in(network)
    path = str(tmp_path / "backbone.onnx")
    facts = export_stage(network, save(network, tmp_path / "c.h5"), path)
    session = runtime.InferenceSession(path)
    told = session.get_modelmeta().custom_metadata_map
    assert told.keys() == facts.keys() and told["mean"] == " ".join(map(str, facts["mean"]))
    assert (told["arch"], told["features"]) == (arch, str(network.width))
    # Not the number of images that it was exported with.
    (found,) = session.run(None, {"image": views(5, 16).numpy()})
    with torch.no_grad():
        expected = network.trunk(views(5, 16))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


# ---- import ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_torchvision_weights_come_in(suffix: str, tmp_path: Path) -> None:
    theirs = lived_in(models.resnet18(weights=None))
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in theirs.state_dict().items()}},
            path,
        )
    else:
        save_file(theirs.state_dict(), path)
    network = imported(path, build("resnet18", 224, [7, 9], seed=0))
    theirs.fc = nn.Identity()  # type: ignore[assignment]
    assert torch.equal(network.trunk(views(2, 64)), theirs(views(2, 64)))
    assert network.clusters == [7, 9]


class ReferenceAlexNet(nn.Module):
    """The layout of the reference: numbered layers, convolutions with a bias."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride, pool in (
            *((3, 64, 5, 2, True), (64, 192, 3, 1, True), (192, 384, 3, 1, False)),
            *((384, 256, 3, 1, False), (256, 256, 3, 1, False)),
        ):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2, 1)] if pool else []
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(4))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(4096, 1024), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(1024, 1024), nn.ReLU()),
        )
        self.top_layer0 = nn.Linear(1024, 3)

    def forward(self, view: Tensor) -> Tensor:
        return self.classifier(self.features(view).flatten(1))


@torch.no_grad()
def test_reference_alexnet_comes_in_with_its_biases(tmp_path: Path) -> None:
    theirs = lived_in(ReferenceAlexNet())
    torch.save(theirs.state_dict(), tmp_path / "alexnet.pth")
    network = build("alexnet-small", 32, [3], seed=0)
    network = imported(tmp_path / "alexnet.pth", network)
    torch.testing.assert_close(network.trunk(views(4, 32)), theirs(views(4, 32)))


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_reference_resnets_come_in(depth: int, tmp_path: Path) -> None:
    """Its layers are torchvision's, by number in one Sequential."""
    theirs = nn.Sequential(*[*getattr(models, f"resnet{depth}")(weights=None).children()][:-1])
    lived_in(theirs)
    state = {f"features.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "resnet.pth")
    network = imported(tmp_path / "resnet.pth", build(f"resnet{depth}", 224, [3], seed=0))
    expected = theirs(views(2, 64)).flatten(1)
    torch.testing.assert_close(network.trunk(views(2, 64)), expected)


def test_what_was_exported_comes_back(tmp_path: Path) -> None:
    network = build("resnet18", 32, [2], seed=0)
    lived_in(network)
    path = tmp_path / "backbone.safetensors"
    export_stage(network, save(network, tmp_path / "c.h5"), str(path))
    back = imported(path, build("resnet18", 32, [2], seed=1))
    for name, tensor in network.trunk.state_dict().items():
        assert torch.equal(back.trunk.state_dict()[name], tensor)


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(BadData, match=r"evil\.pth"):
        imported(tmp_path / "evil.pth", build("alexnet-small", 16, [2], seed=0))
    assert not (tmp_path / "owned").exists()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_file(
        build("alexnet-small", 16, [2], seed=0).trunk.state_dict(), tmp_path / "a.safetensors"
    )
    with pytest.raises(BadData, match=r"nothing for 'conv1\.weight'.*--arch"):
        imported(tmp_path / "a.safetensors", build("resnet18", 16, [2], seed=0))
    with pytest.raises(BadData, match="shape"):
        imported(tmp_path / "a.safetensors", build("alexnet", 16, [2], seed=0))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no tensors")
        with pytest.raises(BadData, match=name):
            imported(tmp_path / name, build("alexnet-small", 16, [2], seed=0))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadData, match="list"):
        imported(tmp_path / "list.pth", build("alexnet-small", 16, [2], seed=0))
    with pytest.raises(NoInput, match="absent"):
        imported(tmp_path / "absent.pth", build("alexnet-small", 16, [2], seed=0))


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        *(("", ""), ("net", ""), ("network", "module.")),
        *(("", "_orig_mod."), ("model", "module._orig_mod."), ("state_dict", "model._orig_mod.")),
        *(("state_dict", "model."), ("state_dict", "net."), ("state_dict", "network.")),
        *(("state_dict", "model.backbone."), ("state_dict", "module.base_encoder.")),
    ],
)
def test_what_training_scripts_put_around_a_network_is_taken_off(
    wrapper: str, prefix: str, tmp_path: Path
) -> None:
    network = build("alexnet-small", 16, [2], seed=0)
    state = {f"{prefix}{name}": tensor for name, tensor in network.trunk.state_dict().items()}
    torch.save({"epoch": 3, wrapper: state} if wrapper else state, tmp_path / "a.pth")
    ours, unused = fitted(read_weights(str(tmp_path / "a.pth")), network, "a.pth")
    assert not unused
    assert all(torch.equal(ours[n], t) for n, t in network.trunk.state_dict().items())


def test_of_two_networks_in_a_file_neither_is_taken() -> None:
    network = build("alexnet-small", 16, [2], seed=0)
    state = network.trunk.state_dict()
    two = {f"{part}.{name}": state[name] for part in ("backbone", "encoder") for name in state}
    names = r"'backbone\.conv1\.0\.weight' and 'encoder\.conv1\.0\.weight' are both 'conv1"
    with pytest.raises(BadData, match=rf"two\.pth: {names}"):
        fitted(two, network, "two.pth")
    # What the trunk has no use for may be there twice.
    heads = {f"{part}.fc.weight": views(1, 2) for part in ("backbone", "encoder")}
    assert fitted(state | heads, network, "one.pth")[1] == list(heads)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    network = build("alexnet-small", 16, [2], seed=0)
    state = {f"model.{name}": tensor for name, tensor in network.trunk.state_dict().items()}
    last = state["model.fc7.1.bias"] = state["model.fc7.1.bias"].double()
    last[-1] = wrong
    with pytest.raises(BadData, match=r"a\.pth: 'model\.fc7\.1\.bias' is not finite"):
        fitted(state, network, "a.pth")
    # Of what is not taken it does not matter.
    last[-1] = 0
    assert fitted(state | {"top.bias": torch.tensor(wrong)}, network, "a.pth")[1] == ["top.bias"]


def test_where_no_name_fits_one_of_the_files_is_told(tmp_path: Path) -> None:
    network = build("alexnet-small", 16, [2], seed=0)
    state = {f"vision.{name}": tensor for name, tensor in network.trunk.state_dict().items()}
    with pytest.raises(BadData, match=r"names such as 'vision\.conv1\.0\.weight'"):
        fitted(state, network, "a.pth")
    torch.save({"epoch": 3, "weights": state}, tmp_path / "a.pth")
    with pytest.raises(BadData, match=r"a\.pth: no tensor among \['epoch', 'weights'\]"):
        read_weights(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_left_of_a_pth_is_bad_data_at_any_length(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"conv1.weight": views(2, 4)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), 20):
        path.write_bytes(whole[:length])
        with pytest.raises(BadData, match=r"cut\.pth: not a file of tensors"):
            read_weights(str(path))


@pytest.mark.parametrize("text", ["hello world", "a", "{}", "[1, 2]", "\u00e9", "conv1,0.5\n", "u"])
def test_text_is_bad_data(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text(text)
    with pytest.raises(BadData, match=r"text\.pth: not a file of tensors"):
        read_weights(str(tmp_path / "text.pth"))


@pytest.mark.parametrize("error", [StoppedEarly("stopped"), MemoryError(), PermissionError()])
def test_a_machine_that_fails_is_no_damage_of_the_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole.pth").touch()
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        read_weights(str(tmp_path / "whole.pth"))


@pytest.mark.parametrize("arch", ["alexnet", "alexnet-small"])
def test_torchvisions_alexnet_is_said_to_be_none_of_ours(arch: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = models.alexnet(weights=None).state_dict()
        network = build(arch, 224, [2], seed=0)
    with pytest.raises(BadData, match=r"theirs holds no BatchNorm.*its AlexNet can't"):
        fitted(theirs, network, "theirs")


@pytest.mark.parametrize(("arch", "deeper"), [("resnet18", "resnet34"), ("resnet50", "resnet101")])
def test_a_deeper_network_is_not_cut_to_ours(arch: str, deeper: str) -> None:
    """All blocks of the shallower one fit, and are those of another network."""
    network = build(arch, 224, [2], seed=0)
    theirs = getattr(models, deeper)(weights=None).state_dict()
    with pytest.raises(BadData, match=r"'layer\d\.\d+\..*' has no place in .*; choose the --arch"):
        fitted(theirs, network, "theirs")
    own = getattr(models, arch)(weights=None).state_dict()
    assert fitted(own, network, "own")[1] == ["fc.weight", "fc.bias"]


def test_from_the_command_line_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(build("alexnet-small", 16, [2], seed=0), tmp_path / "checkpoint.h5")
    size = ["--arch", "alexnet-small", "--image-size", "16"]
    for line in (
        ["export", "checkpoint.h5", "-o", "backbone.safetensors"],
        ["import", "backbone.safetensors", *size, "--heads", "4x2", "-o", "start.h5"],
    ):
        done = CliRunner().invoke(app, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    start = formats.read_checkpoint("start.h5")
    assert start.heads == [4, 4] and start.step == 0
    assert start.header and start.header.inputs[0]["path"] == "backbone.safetensors"
