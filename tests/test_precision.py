"""--precision auto and --compile: chosen by the clock, kept once chosen, the same results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sela_cli import (
    envelope,
    formats,
    interrupt,
    logits,
    loop,
    networks,
    parallel,
    precision,
    training,
    unfinished,
)
from sela_cli.cli import app
from sela_cli.devices import LEAD
from sela_cli.envelope import Provenance
from sela_cli.errors import StoppedEarly, UsageError
from sela_cli.formats import Checkpoint
from sela_cli.images.batches import Images, open_images
from sela_cli.labels import LabelSettings, label_stage
from sela_cli.logits import embed_stage
from sela_cli.networks import build
from sela_cli.recipe import Recipe
from sela_cli.run_settings import settings_of
from sela_cli.training import Trainer


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks._FILTERS, "alexnet-small", (4, 6, 6, 6, 4))


@pytest.fixture(scope="module")
def images() -> Images:
    return open_images("digits", 16, limit=40)[0]


def our_clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes on by its `cost` when it is read, once."""
    clock = SimpleNamespace(now=0.0, cost=0.0)

    def read() -> float:
        clock.now += clock.cost
        clock.cost = 0.0
        return float(clock.now)

    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=read))
    return clock


@pytest.mark.parametrize(
    ("half", "chosen"), [(0.5, "bfloat16"), (0.95, "float32"), (2.0, "float32")]
)
@pytest.mark.parametrize("train", [True, False])
def test_the_faster_one_is_chosen(
    half: float, chosen: str, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of ours; the network and the random state stay as they are."""
    clock = our_clock(monkeypatch)

    def arithmetic(device: str, name: str) -> Any:
        clock.cost = {"float32": 1.0, "bfloat16": half}[name]
        return nullcontext()

    monkeypatch.setattr(precision, "autocast", arithmetic)
    network = build("alexnet-small", 16, [5, 4], seed=0)
    before, state = network.arrays(), torch.get_rng_state()
    before = {name: array.copy() for name, array in before.items()}
    assert precision.faster(network, 4, "cpu", train) == chosen
    assert all(np.array_equal(before[name], array) for name, array in network.arrays().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_on_a_gpu_the_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain launches take the processor as long in either arithmetic."""
    clock = our_clock(monkeypatch)

    def arithmetic(device: str, name: str) -> Any:
        clock.cost, clock.name = 1.0, name
        return nullcontext()

    class Replayed:
        def __init__(self, work: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.work, self.calls = work, 0

        def __call__(self, view: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            result = self.work(view)
            if self.calls > LEAD:
                clock.cost = {"float32": 1.0, "bfloat16": 0.5}[clock.name]
            return result

    monkeypatch.setattr(precision, "autocast", arithmetic)
    monkeypatch.setattr(precision, "has_graphs", lambda device: True)
    monkeypatch.setattr(precision, "Graphed", Replayed)
    network = build("alexnet-small", 16, [5, 4], seed=0)
    assert precision.faster(network, 4, "cpu", True) == "bfloat16"
    monkeypatch.setattr(precision, "has_graphs", lambda device: False)
    assert precision.faster(network, 4, "cpu", True) == "float32"


class Measured(Exception):
    """Nothing is to follow."""


@pytest.mark.parametrize(
    ("processes", "training_views", "turned_views", "probe_views"),
    [(1, 10, 40, 16), (3, 4, 16, 6)],
)
def test_what_one_process_has_of_a_batch_is_measured(
    processes: int,
    training_views: int,
    turned_views: int,
    probe_views: int,
    images: Images,
    labels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RotNet's head sees each image four times; a batch of an embedding is one process's."""
    measured = []

    def faster(network: Any, views: int, *_: Any, **__: Any) -> str:
        measured.append(views)
        raise Measured

    monkeypatch.setattr(precision, "faster", faster)
    monkeypatch.setattr(loop, "faster", faster)
    checkpoint, output = str(tmp_path / "c.h5"), str(tmp_path / "o.h5")
    trainer = Trainer(build("alexnet-small", 16, [5], seed=0), Recipe())
    formats.write_checkpoint(checkpoint, trainer.checkpoint(40), Provenance("test", {}))
    options = {"arch": "alexnet-small", "heads": "5", "batch_size": 10, "precision": "auto"}
    line = f"--data digits --limit 40 -c {checkpoint} --precision auto -o {output}"
    monkeypatch.setattr(parallel, "size", lambda: processes)
    with pytest.raises(Measured):
        settings = settings_of("digits", 16, options)
        loop._measured(images, settings, "cpu", None)
    for rotation in (False, True):
        asked = training.prepare(
            "train", "digits", labels, output, options | {"rotation": rotation}, limit=40,
            arch="alexnet-small", image_size=16,
        )  # fmt: skip
        with pytest.raises(Measured):
            asked.run("cpu", lambda *_: None)
    # --method knn takes no size of batches.
    for verb in ("probe --method linear --batch-size 16", "probe --method knn", "embed"):
        done = CliRunner().invoke(app, f"{verb} {line}".split())
        assert isinstance(done.exception, Measured), done.output
    assert measured == [training_views, training_views, turned_views, probe_views, 192, 40]


@contextmanager
def no_progress(title: str) -> Iterator[Any]:
    yield lambda done, total, note: None


def test_a_run_keeps_the_arithmetic_it_began_in(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "arch": "alexnet-small", "heads": "5", "epochs": 1.0, "opts": 2, "batch_size": 20,
        "precision": "auto",
    }  # fmt: skip
    settings = settings_of("digits", 16, options)
    watcher = loop.Watcher(no_progress, lambda text: None)
    monkeypatch.setattr(loop, "faster", lambda *_, **__: "bfloat16")
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly):
        loop.run(images, tmp_path / "run", settings, watcher)
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    monkeypatch.setattr(loop, "faster", lambda *_, **__: "float32")
    loop.run(images, tmp_path / "run", settings, watcher)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["recipe"]
    recipe = formats.read_checkpoint(str(tmp_path / "run" / "checkpoint.h5")).recipe
    assert kept["precision"] == recipe["precision"] == "bfloat16"


@pytest.fixture
def labels(images: Images, tmp_path: Path) -> str:
    """The path of random labels of one head."""
    network = build("alexnet-small", 16, [5], seed=0)
    scores, labels = str(tmp_path / "a.h5"), str(tmp_path / "l.h5")
    embed_stage(images, network, scores, Provenance("embed", {}, dataset_id=images.dataset_id))
    label_stage(scores, labels, LabelSettings(assign="random"))
    return labels


def test_a_training_keeps_the_arithmetic_it_began_in(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "c.h5")

    def prepared(**more: Any) -> training.Training:
        options = {"epochs": 1.0, "batch_size": 10, "precision": "auto"}
        return training.prepare("train", "digits", labels, output, options, limit=40, **more)

    def train(asked: training.Training) -> str:
        return str(asked.run("cpu", lambda *_: None).recipe["precision"])

    monkeypatch.setattr(precision, "faster", lambda *_, **__: "bfloat16")
    first = prepared(arch="alexnet-small", image_size=16)
    with monkeypatch.context() as stopping, pytest.raises(StoppedEarly):
        stopping.setattr(interrupt, "requested", lambda: True)
        train(first)
    monkeypatch.setattr(precision, "faster", lambda *_, **__: "float32")
    assert train(prepared(arch="alexnet-small", image_size=16)) == "bfloat16"
    assert train(prepared(checkpoint=output, force=True)) == "bfloat16"


def test_for_a_network_from_elsewhere_the_arithmetic_is_measured(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sela import` knows of no training that it began in."""
    start, output = str(tmp_path / "start.h5"), str(tmp_path / "c.h5")
    network = build("alexnet-small", 16, [5], seed=0)
    state = Checkpoint(network.arrays(), {}, "alexnet-small", 16, [5], 0, 0.0, {})
    formats.write_checkpoint(start, state, Provenance("test", {}))
    monkeypatch.setattr(precision, "faster", lambda *_, **__: "bfloat16")
    options = {"epochs": 1.0, "batch_size": 40, "precision": "auto"}
    data = ("digits", labels, output, options)
    asked = training.prepare("train", *data, checkpoint=start, limit=40)
    assert asked.run("cpu", lambda *_: None).recipe["precision"] == "bfloat16"


def test_a_probe_keeps_the_arithmetic_it_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = str(tmp_path / "c.h5"), str(tmp_path / "p.h5")
    trainer = Trainer(build("alexnet-small", 16, [5], seed=0), Recipe())
    formats.write_checkpoint(checkpoint, trainer.checkpoint(40), Provenance("test", {}))
    line = f"probe --data digits --limit 40 --checkpoint {checkpoint} --method linear --epochs 2"
    line += f" --batch-size 16 --precision auto --device cpu -q -o {output}"
    # Of all that ask, the training alone hears of it.
    monkeypatch.setattr(unfinished, "interrupt", SimpleNamespace(requested=lambda: True))
    for step, chosen in ((1, "bfloat16"), (2, "float32")):
        monkeypatch.setattr(precision, "faster", lambda *_, chosen=chosen, **__: chosen)
        done = CliRunner().invoke(app, line.split())
        assert isinstance(done.exception, StoppedEarly), done.output
        left = formats.read_checkpoint(f"{output}.unfinished")
        assert (left.step, left.recipe["precision"]) == (step, "bfloat16")


def test_an_embedding_keeps_the_arithmetic_it_began_in_and_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.h5"
    line = "embed --data digits --limit 40 --arch alexnet-small --image-size 16 --heads 5"
    line += f" --batch-size 16 --precision auto --device cpu -q -o {output}"

    def embed(chosen: str, stop: bool) -> BaseException | None:
        with monkeypatch.context() as patch:
            patch.setattr(precision, "faster", lambda *_, **__: chosen)
            # Of all that ask, the embedding alone hears of it.
            patch.setattr(logits, "interrupt", SimpleNamespace(requested=lambda: stop))
            return CliRunner().invoke(app, line.split()).exception

    for done, chosen in ((16, "bfloat16"), (32, "float32")):
        assert f"after {done} images" in str(embed(chosen, stop=True))
        assert logits.began_in(str(output)) == "bfloat16"
    assert embed("float32", stop=False) is None
    assert envelope.read_header(str(output)).parameters["precision"] == "bfloat16"


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="compiler"):
        Trainer(build("alexnet-small", 16, [5], 0), Recipe(compile=True))


@pytest.mark.slow
def test_a_compiled_step_is_the_step(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for dropout, whose draws are others."""
    monkeypatch.setattr(networks, "_DROPOUT", 0.0)
    losses = []
    for compiled in (False, True):
        recipe = Recipe(epochs=2, batch_size=10, lr=0.05, aug="paper", compile=compiled)
        trainer = Trainer(build("alexnet-small", 16, [5, 4], seed=3), recipe)
        labels_TN = [torch.arange(40) % 5, torch.arange(40) % 4]
        trainer.run(images, labels_TN, 5, lambda: None)
        losses.append(trainer.losses)
    np.testing.assert_allclose(*losses, atol=1e-5)
