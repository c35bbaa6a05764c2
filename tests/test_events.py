"""TensorBoard's event files say what the files of the run say."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sela_cli import formats, loop, networks
from sela_cli.events import Events
from sela_cli.images.batches import open_images
from sela_cli.loop import Watcher
from sela_cli.run_settings import settings_of


@contextmanager
def no_progress(title: str) -> Iterator[Any]:
    yield lambda done, total, note: None


def test_events_are_what_tensorboard_reads(tmp_path: Path) -> None:
    events = Events(tmp_path / "tensorboard")
    events.close()
    assert not (tmp_path / "tensorboard").exists()
    for step in range(5):
        events.record("train/loss", 1 / (step + 1), step)
    events.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert points == [(step, pytest.approx(1 / (step + 1))) for step in range(5)]


def test_a_run_records_each_step_and_round_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(networks._FILTERS, "alexnet-small", (4, 6, 6, 6, 4))
    images = open_images("digits", 16, limit=60)[0]
    options: dict[str, Any] = {
        "arch": "alexnet-small", "heads": "5", "epochs": 3.0, "opts": 4, "batch_size": 16,
        "precision": "float32",
    }  # fmt: skip
    settings = settings_of("digits", 16, options)
    points: dict[str, list[tuple[int, float]]] = {}

    def record(name: str, value: float, step: int) -> None:
        points.setdefault(name, []).append((step, value))

    folder = tmp_path / "run"
    loop.run(images, folder, settings, Watcher(no_progress, lambda text: None, record))
    losses = formats.read_checkpoint(str(folder / "checkpoint.h5")).losses
    assert points["train/loss"] == list(enumerate(losses.tolist()))
    recipe = settings.recipe
    assert points["train/lr"] == [(step, recipe.lr_at(step, 60)) for step in range(len(losses))]
    with (folder / "rounds.csv").open() as stream:
        rounds = list(csv.DictReader(stream))[1:]
    steps = [recipe.steps(position, 60) for position in settings.positions]
    for name in ("churn", "residual", "nmi"):
        assert points[f"round/{name}"] == [
            (step, float(row[name])) for step, row in zip(steps, rounds, strict=True)
        ]
