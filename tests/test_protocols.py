"""The paper's probe protocols from the command line: their plans, and short real runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from typer.testing import CliRunner

from sela_cli import envelope, formats, probes
from sela_cli.cli import app
from sela_cli.envelope import Provenance
from sela_cli.errors import UsageError
from sela_cli.formats import Checkpoint
from sela_cli.networks import build
from sela_cli.probes import KnnRecipe, LinearRecipe


def sela(*arguments: object) -> dict[str, Any]:
    """`sela ARGUMENTS --json`: its result."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json", "-q"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def save(path: Path, arch: str, image_size: int) -> Path:
    network = build(arch, image_size, [3], seed=0)
    state = Checkpoint(network.arrays(), {}, arch, image_size, [3], 0, 0.0, {})
    formats.write_checkpoint(str(path), state, Provenance("test", {}))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and six test images of three colours; two untrained networks."""
    folder = tmp_path_factory.mktemp("protocols")
    rng = np.random.default_rng(0)
    for number in range(18):
        label = number % 3
        pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
        pixels[..., label] += 180
        path = folder / ("train" if number < 12 else "val") / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    save(folder / "alexnet.h5", "alexnet-small", 32)
    save(folder / "resnet.h5", "resnet18", 32)
    return folder


def probe(world: Path, network: str, *options: object) -> dict[str, Any]:
    data = ["--data", world / "train", "--test", world / "val", "--device", "cpu"]
    return sela("probe", *data, "-c", world / f"{network}.h5", *options)


@pytest.mark.parametrize("protocol", ["imagenet-linear", "places-linear"])
def test_plan_of_the_large_scale_protocols(protocol: str, world: Path) -> None:
    plan = probe(world, "alexnet", "-o", world / "no.h5", "--protocol", protocol, "--dry-run")
    assert plan["layers"] == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert plan["linear"]["epochs"] == 36 and plan["linear"]["crops"] == 10
    assert (plan["train"], plan["test"], plan["method"]) == (12, 6, "linear")
    plan = probe(world, "resnet", "-o", world / "no.h5", "--protocol", protocol, "--dry-run")
    assert plan["layers"] == ["features"] and plan["linear"]["epochs"] == 146
    assert not (world / "no.h5").exists()


CONSTANTS: dict[str, dict[str, Any]] = {
    "alexnet": {
        "epochs": 36, "lrs": [0.01], "batch_size": 192, "weight_decay": 1e-5, "crops": 10,
        "aug": "imagenet-crop-flip",
    },
    "resnet": {
        "epochs": 146, "lrs": [0.1], "batch_size": 1024, "weight_decay": 0.0, "crops": 1,
        "aug": "imagenet-crop-flip",
    },
}  # fmt: skip
MILESTONES = {"alexnet": [10, 20, 30], "resnet": [85, 128]}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_linear_probes_are_the_papers(name: str, world: Path) -> None:
    line = (world, name, "-o", world / "no.h5", "--protocol", "imagenet-linear", "--dry-run")
    linear = probe(*line)["linear"]
    assert {option: linear[option] for option in CONSTANTS[name]} == CONSTANTS[name]
    assert [linear["epochs"] * part for part in linear["milestones"]] == pytest.approx(
        MILESTONES[name]
    )


def imagenet(root: Path, image: bytes, classes: int) -> str:
    """As torchvision finds it: a folder for each class, and what they are called."""
    names = [f"n{number:08}" for number in range(classes)]
    torch.save(({name: (name,) for name in names}, []), root / "meta.bin")
    for split in ("train", "val"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.JPEG").write_bytes(image)
    return f"imagenet:{root}"


def places365(root: Path, image: bytes, classes: int) -> str:
    """As torchvision finds it, but for the checksums of the lists."""
    names = [f"/p/place{number}" for number in range(classes)]
    lines = [f"{name}/0.jpg {number}" for number, name in enumerate(names)]
    (root / "categories_places365.txt").write_text(
        "\n".join(f"{name} {number}" for number, name in enumerate(names))
    )
    (root / "places365_train_standard.txt").write_text("\n".join(lines))
    (root / "places365_val.txt").write_text(
        "\n".join(f"{number}.jpg {number}" for number in range(classes))
    )
    (root / "val_256").mkdir()
    for number, name in enumerate(names):
        (root / f"data_256_standard{name}").mkdir(parents=True)
        (root / f"data_256_standard{name}/0.jpg").write_bytes(image)
        (root / f"val_256/{number}.jpg").write_bytes(image)
    return f"places365:{root}"


@pytest.mark.parametrize(
    ("protocol", "write", "classes"),
    [("imagenet-linear", imagenet, 1000), ("places-linear", places365, 365)],
)
def test_plan_of_whole_collections(
    protocol: str,
    write: Callable[[Path, bytes, int], str],
    classes: int,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        datasets.places365, "check_integrity", lambda file, md5: Path(file).exists()
    )
    spec = write(tmp_path, (world / "train/class0/0.png").read_bytes(), classes)
    options = ("--protocol", protocol, "--dry-run", "-o", tmp_path / "no.h5")
    line = ("probe", "--data", spec, "--test", f"{spec}@val", "-c", world / "alexnet.h5")
    plan = sela(*line, *options)
    assert (plan["train"], plan["test"], plan["classes"]) == (classes, classes, classes)
    assert plan["linear"]["epochs"] == 36 and len(plan["layers"]) == 5


def test_options_override_a_protocol(world: Path) -> None:
    plan = probe(
        *(world, "alexnet", "-o", world / "no.h5", "--protocol", "imagenet-linear", "--dry-run"),
        *("--epochs", 3, "--lr", "0.1,0.2", "--layers", "conv4", "--crops", 1),
    )
    assert plan["layers"] == ["conv4"]
    assert (plan["linear"]["epochs"], plan["linear"]["crops"]) == (3, 1)
    assert plan["linear"]["lrs"] == [0.1, 0.2] and plan["linear"]["batch_size"] == 192


def test_what_a_protocol_names_for_the_other_method_is_passed_over(world: Path) -> None:
    """As long as nobody gave it as an option."""
    line = (world, "alexnet", "-o", world / "no.h5", "--dry-run", "--protocol")
    assert probe(*line, "imagenet-linear", "--method", "knn")["knn"]["ks"] == [10]
    plan = probe(*line, "knn", "--method", "both", "--lr", "0.1,0.2", "--validation", 0.3)
    assert plan["knn"]["pca"] == 128 and plan["linear"]["validation"] == 0.3


@pytest.mark.parametrize("test", ["train", "val"])
def test_testing_on_the_training_images_is_warned_of(test: str, world: Path) -> None:
    line = ["probe", "--data", world / "train", "--test", world / test, "-o", world / "no.h5"]
    line += ["-c", world / "alexnet.h5", "--dry-run"]
    done = CliRunner().invoke(app, [*map(str, line)], catch_exceptions=False)
    told = f"warning: {world / test}: trained and tested on the same images" in done.stderr
    assert (done.exit_code, told) == (0, test == "train")


@pytest.mark.parametrize("network", ["alexnet", "resnet"])
def test_a_short_large_scale_probe(network: str, world: Path, tmp_path: Path) -> None:
    output = tmp_path / "probe.h5"
    short = ("--epochs", 4, "--batch-size", 6)
    result = probe(world, network, "-o", output, "--protocol", "imagenet-linear", *short)
    rows = formats.read_probe(str(output))
    layers = ["features"] if network == "resnet" else ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert [row["layer"] for row in rows] == [row["layer"] for row in result["results"]] == layers
    assert max(row["top1"] for row in rows) > 0.6
    assert {row["setting"] for row in rows} == {f"crops={1 if network == 'resnet' else 10}"}


def test_small_linear_reports_the_chosen_rate(world: Path, tmp_path: Path) -> None:
    options = ("--protocol", "small-linear", "--epochs", 2, "--layers", "conv5")
    rows = probe(world, "alexnet", "-o", tmp_path / "probe.h5", *options)["results"]
    assert [row["lr"] for row in rows[:-1]] == [0.1, 0.03, 0.01, 0.003]
    assert {row["split"] for row in rows[:-1]} == {"validation 0.1"}
    assert rows[-1]["split"] == "test" and rows[-1]["n"] == 6


def test_knn_sweeps_twenty_settings(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "probe.h5"
    # More images in the bank than the most neighbours.
    line = ["probe", "--data", "digits", "--limit", 260, "-c", world / "alexnet.h5", "-o", output]
    rows = sela(*line, "--protocol", "knn", "--pca", 8, "--device", "cpu")["results"]
    assert len({row["setting"] for row in rows}) == len(rows) == 2 * 5 * 2


def test_a_protocols_components_are_as_many_as_there_are(world: Path, tmp_path: Path) -> None:
    """Of twelve images there can't be 128, and nobody asked for so many."""
    line = (world, "alexnet", "-o", tmp_path / "probe.h5", "--protocol", "knn")
    settings = [row["setting"] for row in probe(*line)["results"]]
    assert settings[-1] == "k=1 sigma=0.5 pca=12"


@pytest.mark.parametrize("method", ["linear", "knn", "both"])
def test_a_probe_file_tells_every_setting_that_it_was_made_with(
    method: str, world: Path, tmp_path: Path
) -> None:
    """Defaults too, which another version may have others of."""
    output, options = tmp_path / "probe.h5", ("--method", method, "--limit", 9)
    if method != "knn":
        options += ("--layers", "conv5", "--epochs", 1, "--batch-size", 4)
    probe(world, "alexnet", "-o", output, *options)
    told = envelope.read_header(str(output)).parameters
    linear = asdict(LinearRecipe(epochs=1, batch_size=4)) if method != "knn" else None
    knn = asdict(KnnRecipe()) if method != "linear" else None
    assert told.get("linear") == envelope.through_json(linear)
    assert told.get("knn") == envelope.through_json(knn)
    assert told.get("layers") == (["conv5"] if linear else None)
    others = {"method": method, "limit": 9, "precision": "float32", "seed": 0, "holdout": None}
    assert {name: told[name] for name in others} == others


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_more_components_than_there_are_are_refused_before_features_are_made(
    dry: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(probes, "features")
    line = (world, "alexnet", "-o", tmp_path / "probe.h5", "--protocol", "knn", "--pca", 13, *dry)
    with pytest.raises(UsageError, match=r"--pca 13: 12 images .* 1024 .* at most 12"):
        probe(*line)


@pytest.mark.parametrize(
    "options",
    ["--aug mirror", "--lr 0", "--k 0", "--sigma -1", "--layers conv9", "--device abacus"],
)
def test_options_are_refused_before_images_are_decoded(
    options: str, world: Path, tmp_path: Path
) -> None:
    line = f"probe --data absent -c {world}/alexnet.h5 -o {tmp_path}/probe.h5 {options}"
    with pytest.raises(UsageError, match=options.split()[0]):
        sela(*line.split())
