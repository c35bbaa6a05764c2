"""The constants of the paper and of its reference implementation, typed out here once more."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from sela_cli import envelope, formats
from sela_cli.cli import app
from sela_cli.errors import UsageError
from sela_cli.images.augment import AUGMENTATIONS, Augmentation
from sela_cli.images.batches import open_images
from sela_cli.labels import LabelSettings
from sela_cli.presets import PRESETS, retraining
from sela_cli.recipe import Recipe
from sela_cli.run_settings import settings_of

IMAGENET: dict[str, Any] = {
    "image_size": 224, "lamb": 25, "epochs": 400, "opts": 100, "relabel": "quadratic",
    "relabel_heads": "all", "batch_size": 256, "momentum": 0.9, "weight_decay": 1e-5,
    "aug": "imagenet", "assign": "balanced", "marginal": "uniform",
}  # fmt: skip
CIFAR: dict[str, Any] = {
    "arch": "alexnet", "image_size": 224, "lamb": 10, "epochs": 400, "opts": 400,
    "relabel": "linear", "relabel_heads": "cycle", "batch_size": 128, "momentum": 0.9,
    "weight_decay": 5e-4, "aug": "paper", "view": "random",
}  # fmt: skip
WANTED = {
    "imagenet-alexnet": IMAGENET | {"arch": "alexnet", "heads": [3000] * 10},
    "imagenet-resnet50": IMAGENET | {"arch": "resnet50", "heads": [3000] * 10},
    "cifar10": CIFAR | {"heads": [128] * 10},
    "cifar100": CIFAR | {"heads": [512] * 10},
    "svhn": CIFAR | {"heads": [128]},
}
# Epoch -> learning rate.
RATES = {
    "imagenet": {0: 0.05, 149: 0.05, 150: 5e-3, 299: 5e-3, 300: 5e-4, 350: 5e-5, 399: 5e-5},
    "cifar": {0: 0.03, 239: 0.03, 240: 3e-3, 319: 3e-3, 320: 3e-4, 399: 3e-4},
}


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with those of training and labelling beside the others."""
    parts = settings["recipe"] | settings["labels"]
    return {name: value for name, value in settings.items() if name not in ("recipe", "labels")} | (
        parts
    )


def planned(*options: str, refused: str = "") -> tuple[dict[str, Any], str]:
    """What `sela run --dry-run` says, as values and as text, before it is refused, if so."""
    line = ["run", "--data", "digits", "--limit", "128", "--out", "absent", "--dry-run", *options]
    text = CliRunner().invoke(app, line)
    values = CliRunner().invoke(app, [*line, "--json"])
    for result in (text, values):
        assert refused in str(result.exception) if refused else not result.exit_code, result.output
    return flat(json.loads(values.stdout)["settings"]), text.stdout


@pytest.mark.parametrize("name", WANTED)
def test_constants_are_those_of_the_paper(name: str) -> None:
    settings = settings_of(name, None, {})
    shown = flat(envelope.through_json(asdict(settings)))
    assert {option: shown[option] for option in WANTED[name]} == WANTED[name]
    kind = "imagenet" if "imagenet" in name else "cifar"
    for epoch, rate in RATES[kind].items():
        assert settings.recipe.lr_at(epoch, settings.recipe.batch_size) == pytest.approx(rate)
    positions = settings.positions
    power = 2 if kind == "imagenet" else 1
    wanted = [401.01 * (k / (settings.opts - 1)) ** power for k in range(settings.opts)]
    assert positions == pytest.approx([position for position in wanted if position < 400])


@pytest.mark.parametrize(("epochs", "milestones"), [(200, (120, 160)), (800, (480, 640))])
def test_shorter_and_longer_cifar_runs_have_the_papers_milestones(
    epochs: int, milestones: tuple[int, int]
) -> None:
    recipe = settings_of("cifar10", None, {"epochs": float(epochs)}).recipe
    for number, epoch in enumerate(milestones):
        assert recipe.lr_at(epoch - 1, 128) == pytest.approx(0.03 * 0.1**number)
        assert recipe.lr_at(epoch, 128) == pytest.approx(0.03 * 0.1 ** (number + 1))


def test_augmentations_are_those_of_the_paper() -> None:
    common = {"jitter": 0.4, "hue": 0.4, "jitter_share": 1.0, "grey": 0.2, "blur": 0, "flip": 0.5}
    assert AUGMENTATIONS["imagenet"] == Augmentation((0.08, 1.0), grey_first=True, **common)
    assert AUGMENTATIONS["paper"] == Augmentation(scale=(0.2, 1.0), **common)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "batch_size", "lr_factor"])
def test_help_tells_the_defaults_of_training(name: str) -> None:
    assert f"default {getattr(Recipe, name)}" in help_of(name)


@pytest.mark.parametrize("name", ["lamb", "tol", "max_iter"])
def test_help_tells_the_defaults_of_labels(name: str) -> None:
    assert f"default {getattr(LabelSettings, name):g}." in help_of(name)


def help_of(name: str) -> str:
    """What `sela run --help` says of an option."""
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    return next(str(option.help) for option in command.params if option.name == name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_dry_run_shows_every_constant(name: str) -> None:
    """Also where there are too few images for its clusters, which it ends with."""
    heads = settings_of(name, None, {}).heads
    # Small, so that no network of the paper's size is built.
    small = ("--arch", "alexnet-small", "--image-size", "16")
    refused = f"{max(heads)} clusters for 128 images" if max(heads) > 128 else ""
    shown, text = planned("--preset", name, *small, refused=refused)
    lines = dict(line.split(" = ") for line in text.splitlines() if " = " in line)
    assert set(shown) - set(lines) == {"arch", "heads", "image_size", "start"}
    assert "alexnet-small at 16 pixels, fresh" in text and f"heads {[*heads]}" in text
    for option, value in PRESETS[name].items():
        if option in lines and not isinstance(value, tuple):
            assert lines[option] == str(shown[option]) == str(value)


def test_a_run_labels_in_the_memory_that_it_is_allowed() -> None:
    shown, text = planned("--max-memory", "900M")
    assert shown["max_memory"] == 900 << 20 and f"max_memory = {900 << 20}" in text


OTHER: dict[str, Any] = {
    "arch": "resnet34", "image_size": 32, "heads": "7x2", "lamb": 3.0, "epochs": 5.0, "opts": 6,
    "relabel": {"linear": "quadratic", "quadratic": "linear"},
    "relabel_heads": {"cycle": "all", "all": "cycle"}, "batch_size": 9, "lr": 0.7,
    "lr_milestones": (0.1,), "weight_decay": 0.5, "aug": "strong", "view": "centre",
    "store": {"logits": "features", "features": "logits"}, "head_init": "random",
    "precision": "float32",
    "dtype": {"float32": "float16", "float16": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_any_constant_can_be_overridden(name: str) -> None:
    for option, before in PRESETS[name].items():
        other = OTHER[option]
        value = other[before] if isinstance(other, dict) else other
        settings = settings_of(name, None, {option: value})
        shown = flat(asdict(settings))
        expected = (7, 7) if option == "heads" else value
        assert shown[option] == expected != before


def test_the_papers_ablations_are_options() -> None:
    """Table 1 and 2: #opts, K and T at 160 epochs."""
    for opts, heads in ((0, "3000x1"), (40, "3000x1"), (160, "3000x1"), (80, "10000x1")):
        options = {"opts": opts, "heads": heads, "epochs": 160.0}
        settings = settings_of("imagenet-alexnet", None, options)
        assert settings.heads == (int(heads.split("x")[0]),)
        assert len(settings.positions) == max(opts - 1, 0)
        assert all(position < 160 for position in settings.positions)


def test_random_labels_take_nothing_of_a_solve_from_a_preset_and_refuse_it_as_an_option() -> None:
    settings = settings_of("cifar10", None, {"assign": "random", "seed": 3})
    assert settings.labels == LabelSettings(assign="random", seed=3)
    with pytest.raises(UsageError, match="--lamb is not for --assign random"):
        settings_of("cifar10", None, {"assign": "random", "lamb": 10.0})


@pytest.mark.parametrize(("options", "batch_size"), [([], 256), (["--rotation"], 64)])
def test_retraining_is_the_papers(options: list[str], batch_size: int, tmp_path: Path) -> None:
    """Table 5: any labels, here of no network at all, 90 epochs, a tenth of the rate every 30."""
    images, _ = open_images("digits", 16, limit=20)
    attributes = dict.fromkeys(formats.LABEL_ATTRIBUTES, 0)
    head = formats.HeadLabels(np.arange(20) % 3, np.zeros(3), attributes)
    path = str(tmp_path / "labels.h5")
    formats.write_labels(
        path,
        formats.Labels(images.keys, images.index_N, [head]),
        envelope.Provenance("test", {}, dataset_id=images.dataset_id),
    )
    line = ["retrain", "--data", "digits", "--limit", "20", "--labels", path, "-o", "absent.h5"]
    line += ["--arch", "alexnet-small", "--image-size", "16", "--dry-run", "--json", *options]
    shown = json.loads(CliRunner().invoke(app, line).stdout)
    constants = envelope.through_json(retraining(rotation=bool(options)))
    assert constants.items() <= shown["recipe"].items()
    recipe = Recipe.of(shown["recipe"])
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (90, batch_size, 1e-5)
    assert recipe.rotation == bool(options)
    for epoch, rate in {0: 0.05, 29: 0.05, 30: 5e-3, 59: 5e-3, 60: 5e-4, 89: 5e-4}.items():
        assert recipe.lr_at(epoch, batch_size) == pytest.approx(rate)
    # The paper's milestones are of its own schedule: another may be asked for.
    cosine = CliRunner().invoke(app, [*line, "--lr-schedule", "cosine"])
    assert cosine.exit_code == 0, cosine.output
    assert json.loads(cosine.stdout)["recipe"]["lr_schedule"] == "cosine"
