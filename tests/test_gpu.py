"""What only a GPU can show: training as one graph, and the commands on it. Skipped without."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Sela

from sela_cli import training
from sela_cli.devices import sent
from sela_cli.images.batches import Images, open_images
from sela_cli.logits import forward
from sela_cli.networks import build
from sela_cli.recipe import Recipe
from sela_cli.training import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

HEADS = [5, 4]
STEPS = 12


@pytest.fixture(scope="module")
def images() -> Images:
    return open_images("digits", 32, limit=200)[0]


def trained(images: Images, recipe: Recipe, arch: str, device: str = "cuda") -> Trainer:
    trainer = Trainer(build(arch, 32, HEADS, 3, recipe.rotation), recipe, device)
    labels_TN = [torch.arange(len(images)) % clusters for clusters in HEADS]
    trainer.run(images, labels_TN, STEPS, lambda: None)
    return trainer


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rotation", [False, True])
def test_a_graph_trains_as_plain_steps_do(
    arch: str, precision: str, rotation: bool, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through every rate of the schedule, and with the same dropout."""
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph)
    )
    recipe = Recipe(
        epochs=2, batch_size=40, aug="strong", lr=0.01, lr_schedule="cosine",
        precision=precision, rotation=rotation,
    )  # fmt: skip
    graphed = trained(images, recipe, arch)
    assert len(replays) == STEPS - 3
    monkeypatch.setattr(training, "Graphed", lambda step: step)
    plain = trained(images, recipe, arch)
    tolerance = 1e-2 if precision == "float32" else 5e-2
    np.testing.assert_allclose(graphed.losses, plain.losses, rtol=tolerance)
    assert len(set(graphed.losses)) == STEPS


def test_a_gpu_trains_as_the_processor_does(images: Images) -> None:
    """Where nothing is dropped: the draws of a GPU are others."""
    recipe = Recipe(epochs=2, batch_size=40, aug="paper", lr=0.01)
    here, there = (trained(images, recipe, "resnet18", device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there.losses, here.losses, rtol=2e-2)


def test_training_goes_on_from_a_checkpoint(images: Images) -> None:
    recipe = Recipe(epochs=4, batch_size=40, aug="paper", lr=0.01)
    whole = trained(images, recipe, "resnet18")
    first = Trainer(build("resnet18", 32, HEADS, 3), recipe, "cuda")
    second = Trainer(build("resnet18", 32, HEADS, 9), recipe, "cuda")
    labels_TN = [torch.arange(len(images)) % clusters for clusters in HEADS]
    first.run(images, labels_TN, 6, lambda: None)
    second.restore(first.checkpoint(len(images)), "here")
    second.run(images, labels_TN, STEPS, lambda: None)
    np.testing.assert_allclose(second.losses, whole.losses, rtol=1e-2)


def test_a_short_last_batch_may_be_the_fourth(images: Images) -> None:
    network = build("resnet18", 32, HEADS, 3)
    whole, short = (
        torch.cat([logits for logits, _ in forward(network, images, size, "cuda", features=False)])
        for size in (200, 60)
    )
    torch.testing.assert_close(short, whole, rtol=1e-2, atol=1e-3)


def test_what_is_sent_arrives() -> None:
    values = torch.arange(1 << 20)
    for tensor in (values, values[::3], values.bool()):
        assert torch.equal(sent(tensor, "cuda").cpu(), tensor)


def test_the_commands_work_on_a_gpu(sela: Sela, tmp_path: Path) -> None:
    run = "run --data digits --preset digits --epochs 3 --opts 3 --precision auto --device cuda"
    done = sela(*run.split(), "--out", "r", "--json")
    assert json.loads(done.stdout)["knn"]["trained"] > 0.5
    for device in ("cpu", "cuda"):
        embed = f"embed --data digits -c r/checkpoint.h5 -o {device}.h5 --device {device}"
        sela(*embed.split())
    with h5py.File(tmp_path / "cpu.h5") as here, h5py.File(tmp_path / "cuda.h5") as there:
        for head in here["logits"]:
            one_NK, other_NK = here["logits"][head][:], there["logits"][head][:]
            assert np.abs(one_NK - other_NK).max() < 0.02 * np.abs(one_NK).max()
    for line in (
        "label cuda.h5 -o labels.h5 --device cuda",
        "retrain --data digits --labels labels.h5 --arch resnet18 --image-size 16 --epochs 2 "
        "--rotation --precision bfloat16 --device cuda -o other.h5",
        "probe --data digits -c other.h5 --holdout 0.2 --method both --epochs 2 "
        "--device cuda -o probe.h5",
    ):
        sela(*line.split())
