"""The alternating loop: equal to its shell form, exact after interruptions."""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from sela_cli import collapse, envelope, formats, interrupt, loop, metrics, networks, run_settings
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, StoppedEarly, UsageError
from sela_cli.formats import Checkpoint
from sela_cli.fresh import settle
from sela_cli.images.batches import Images, open_images
from sela_cli.loop import Watcher
from sela_cli.probes import KnnRecipe
from sela_cli.recipe import HEAD_INITS, Recipe
from sela_cli.run_settings import RunSettings, check_heads, settings_of
from sela_cli.training import Trainer

OPTIONS: dict[str, Any] = {
    "arch": "alexnet-small", "heads": "5,8", "epochs": 3.0, "opts": 4, "batch_size": 16,
    "lamb": 10.0, "precision": "float32",
}  # fmt: skip


@contextmanager
def no_progress(title: str) -> Iterator[Any]:
    yield lambda done, total, note: None


SILENT = Watcher(no_progress, lambda text: None)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few filters: these tests are about the loop, not the network."""
    monkeypatch.setitem(networks._FILTERS, "alexnet-small", (4, 6, 6, 6, 4))


@pytest.fixture(scope="module")
def images() -> Images:
    return open_images("digits", 32, limit=60)[0]


def unlabelled(images: Images) -> Images:
    """The same images, of which no classes are known."""
    bare = images.subset(np.arange(len(images)))
    bare.truth_N, bare.classes = None, ()
    return bare


@pytest.fixture
def settings() -> RunSettings:
    return settings_of("digits", 32, OPTIONS)


def test_more_clusters_than_images_are_refused_before_any_work(tmp_path: Path) -> None:
    images, _ = open_images("digits", 32, limit=20)
    settings = settings_of("digits", 32, {"heads": "21x2"})
    with pytest.raises(UsageError, match="21 clusters for 20 images"):
        check_heads(images, settings)
    with pytest.raises(UsageError, match="21 clusters for 20 images"):
        loop.run(
            images,
            tmp_path / "run",
            settings,
            Watcher(lambda title: nullcontext(print), print),
        )
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_refused_before_any_work(images: Images, tmp_path: Path) -> None:
    settings = settings_of("digits", 32, OPTIONS | {"max_memory": 10 << 20})
    for refused in (
        lambda: check_heads(images, settings),
        lambda: loop.run(images, tmp_path / "run", settings, SILENT),
    ):
        with pytest.raises(UsageError, match="--max-memory 10M is too little"):
            refused()
    assert not (tmp_path / "run").exists()


def test_a_default_is_said_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class OfFeatures(RunSettings):
        store: str = "features"

    monkeypatch.setattr(run_settings, "RunSettings", OfFeatures)
    assert settings_of("digits", 32, OPTIONS).store == "features"
    assert settings_of("digits", 32, OPTIONS | {"store": "logits"}).store == "logits"


def first_steps(settings: RunSettings) -> int:
    """Steps of the 60 images from the first round to the second."""
    return settings.recipe.steps(settings.positions[1], 60)


def digests(folder: Path) -> dict[str, str]:
    """Payload digests of the files that a finished run keeps."""
    return {path.name: envelope.read_header(str(path)).digest for path in folder.glob("*.h5")}


def test_every_round_is_balanced_and_told(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    lines: list[str] = []
    summary = loop.run(images, tmp_path / "run", settings, Watcher(no_progress, lines.append))
    rounds = [line.split(",")[0] for line in lines if line.startswith("round")]
    assert rounds == ["round 1/3", "round 2/3", "round 3/3"]
    for path in (tmp_path / "run").glob("labels-*.h5"):
        for head in formats.read_labels(str(path)).heads:
            assert head.usage_K.max() - head.usage_K.min() <= 1
    with (tmp_path / "run" / "rounds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3"]
    losses = formats.read_checkpoint(str(tmp_path / "run" / "checkpoint.h5")).losses
    assert len(losses) == settings.recipe.steps(3.0, 60)
    assert summary["loss"] == pytest.approx(losses[-3:].mean())
    assert float(rows[1]["loss"]) == pytest.approx(losses[: first_steps(settings)].mean())
    assert 0 <= summary["knn"]["trained"] <= 1
    assert summary["heads"][0]["clusters"] == 5 and summary["heads"][1]["clusters"] == 8


def test_knn_accuracy_is_that_of_some_images_where_there_are_many(
    images: Images, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "KNN_IMAGES", 30)
    loop.run(images, tmp_path / "run", settings, Watcher(no_progress, print))
    for name in ("probe-000.h5", "probe.h5"):
        rows = formats.read_probe(str(tmp_path / "run" / name))
        assert rows and {row["n"] for row in rows} == {6}
        told = envelope.read_header(str(tmp_path / "run" / name)).parameters
        assert told["limit"] == 30 and told["knn"]["ks"] == list(KnnRecipe.ks)


def test_rounds_begin_at_the_positions_of_the_schedule(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    loop.run(images, tmp_path / "run", settings, SILENT)
    before = formats.read_labels(str(tmp_path / "run" / "labels-000.h5"))
    assert {head.attributes["assign"] for head in before.heads} == {"random"}
    for number, position in enumerate(settings.positions, start=1):
        header = envelope.read_header(str(tmp_path / "run" / f"labels-{number:03d}.h5"))
        trained = [entry for entry in header.history if entry["command"] == "train"]
        assert trained[-1]["parameters"]["to"] == position


def test_without_relabelling_the_random_labels_stay(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    loop.run(images, tmp_path / "run", replace(settings, opts=0), SILENT)
    kept = formats.read_labels(str(tmp_path / "run" / "labels.h5"))
    assert all(head.attributes["assign"] == "random" for head in kept.heads)
    assert sorted(path.name for path in (tmp_path / "run").glob("labels*")) == [
        "labels-000.h5",
        "labels.h5",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_stopped_anywhere_it_ends_with_the_same_digests(
    seed: int,
    images: Images,
    settings: RunSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal at every few polls, later ones rarer, since a solve starts over."""
    loop.run(images, tmp_path / "whole", settings, SILENT)
    rng = random.Random(seed)
    stops = 0
    while True:
        polls, last = itertools.count(), rng.randint(1, 12 + 2 * stops)
        monkeypatch.setattr(
            interrupt, "requested", lambda polls=polls, last=last: next(polls) >= last
        )
        try:
            loop.run(images, tmp_path / "broken", settings, SILENT)
            break
        except StoppedEarly:
            stops += 1
        assert stops < 200
    assert stops > 3
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")
    one, two = ((tmp_path / name / "rounds.csv").read_text() for name in ("broken", "whole"))
    assert one == two


@pytest.mark.parametrize("stage", ["embed_stage", "label_stage", "train_stage", "_write_rounds"])
def test_killed_between_stages_it_ends_with_the_same_digests(
    stage: str,
    images: Images,
    settings: RunSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A crash right after each call of a stage, its file written and nothing else done."""
    loop.run(images, tmp_path / "whole", settings, SILENT)
    real = getattr(loop, stage)
    crashes = itertools.count()

    def crashing(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        next(crashes)
        raise KeyboardInterrupt

    for _ in range(12):
        monkeypatch.setattr(loop, stage, crashing)
        with pytest.raises((KeyboardInterrupt, CannotCreate)) as ended:
            loop.run(images, tmp_path / "broken", settings, SILENT)
        if ended.type is CannotCreate:
            break
        monkeypatch.setattr(loop, stage, real)
        folder = tmp_path / "broken"
        if stage != "_write_rounds" and len(list(folder.glob("labels-*.h5"))) == 4:
            break
    if stage != "_write_rounds":
        monkeypatch.setattr(loop, stage, real)
        loop.run(images, tmp_path / "broken", settings, SILENT)
    assert next(crashes) > 1 or stage == "_write_rounds"
    kept = digests(tmp_path / "broken")
    assert {name: kept[name] for name in digests(tmp_path / "whole")} == digests(tmp_path / "whole")


def test_rounds_are_described_when_they_are_made(
    images: Images, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreement = mock.Mock(side_effect=metrics.agreement)
    monkeypatch.setattr(metrics, "agreement", agreement)
    summary = loop.run(images, tmp_path / "run", settings, SILENT)
    heads, rounds = len(settings.heads), len(settings.positions) + 1
    # Once more for the result.
    assert agreement.call_count == heads * (rounds + 1)
    assert {"nmi", "ami", "ari", "accuracy", "purity"} <= set(summary["heads"][0])


def test_rows_that_were_not_kept_are_made_from_the_files(
    images: Images, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an older version began the run, or a process was killed before it kept one."""
    with monkeypatch.context() as crashing, pytest.raises(KeyboardInterrupt):
        crashing.setattr(loop, "_write_rounds", mock.Mock(side_effect=KeyboardInterrupt))
        loop.run(images, tmp_path / "run", settings, SILENT)
    path = tmp_path / "run" / "predictions.json"
    kept = json.loads(path.read_text())
    assert set(kept) == {"0", "1", "2", "3"}
    for number in ("0", "2"):
        kept[number] = {name: kept[number][name] for name in ("entropy", "spread", "unwanted")}
    path.write_text(json.dumps(kept))
    loop.run(images, tmp_path / "run", settings, SILENT)
    loop.run(images, tmp_path / "whole", settings, SILENT)
    one, two = ((tmp_path / name / "rounds.csv").read_text() for name in ("run", "whole"))
    assert one == two


def test_a_folder_in_use_or_of_another_run_is_refused(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    loop.run(images, folder, settings, SILENT)
    whole = digests(folder)
    with pytest.raises(CannotCreate, match="finished"):
        loop.run(images, folder, settings, SILENT)
    with pytest.raises(
        CannotCreate, match=rf"other settings \(opts {settings.opts} there, 2 here\)"
    ):
        loop.run(images, folder, replace(settings, opts=2), SILENT)
    softer = replace(settings.labels, lamb=7.0)
    with pytest.raises(CannotCreate, match=f"lamb {settings.labels.lamb} there, 7.0 here"):
        loop.run(images, folder, replace(settings, labels=softer), SILENT)
    # Another machine may have less memory: it is the same run.
    fewer = replace(settings.labels, max_memory=1 << 30)
    with pytest.raises(CannotCreate, match="a finished run"):
        loop.run(images, folder, replace(settings, labels=fewer), SILENT)
    # And what a version without the option has begun is one of its default.
    noted = (folder / "run.json").read_text()
    run = json.loads(noted)
    del run["settings"]["views"]
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(CannotCreate, match="a finished run"):
        loop.run(images, folder, settings, SILENT)
    (folder / "run.json").write_text(noted)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rounds.csv").write_bytes(b"")
    with pytest.raises(CannotCreate, match="and no run"):
        loop.run(images, tmp_path / "other", settings, SILENT)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CannotCreate, match="another"):
            loop.run(images, folder, settings, SILENT, force=True)
    assert digests(folder) == whole
    loop.run(images, folder, settings, SILENT, force=True)
    assert digests(folder) == whole


@pytest.mark.parametrize(
    "name", ["labels.h5", "rounds.csv", "checkpoint-007.h5", "tensorboard/events.out.1.mine"]
)
def test_files_that_a_run_would_replace_are_refused_even_by_force(
    name: str, images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for force in (False, True):
        with pytest.raises(CannotCreate, match=f"{name} and no run"):
            loop.run(images, tmp_path, settings, SILENT, force=force)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_a_run_begins_beside_other_files_and_leaves_them(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    """A job's log is there before its run is."""
    others = ("log", "photos.h5", "table.csv", "labels-old.h5", "notes.unfinished")
    for name in others:
        (tmp_path / name).write_text("mine")
    loop.run(images, tmp_path, replace(settings, opts=0), SILENT)
    assert {(tmp_path / name).read_text() for name in others} == {"mine"}
    assert (tmp_path / "rounds.csv").exists()


def test_a_run_removes_its_own_files_and_no_others(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    """At its end, and where it is replaced by one with fewer rounds."""
    loop.run(images, tmp_path, settings, SILENT)
    made = {path.name for path in tmp_path.iterdir()}
    mine = ("checkpoint-best.h5", "labels-old.h5", "photos.h5", "table.csv", ".photos.h5.lock")
    for name in (*mine, "notes.unfinished"):
        (tmp_path / name).write_text("mine")
    left = ("labels-1000.h5", "labels-002.h5.1.unfinished", ".logits.h5.partial", ".probe.h5.lock")
    for name in left:
        (tmp_path / name).write_text("a killed run's")
    loop.run(images, tmp_path, replace(settings, opts=2), SILENT, force=True)
    kept = {path.name for path in tmp_path.iterdir()}
    assert made - kept == {"labels-002.h5", "labels-003.h5"}
    assert kept - made == {*mine, "notes.unfinished"}


def test_a_replaced_run_is_not_gone_on_with(
    images: Images, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while --force removes it."""
    loop.run(images, tmp_path, settings, SILENT)
    whole = digests(tmp_path)
    with monkeypatch.context() as crashing, pytest.raises(KeyboardInterrupt):
        real = Path.unlink

        def unlink(path: Path, missing_ok: bool = False) -> None:
            real(path, missing_ok)
            if path.name == "rounds.csv":
                raise KeyboardInterrupt

        crashing.setattr(Path, "unlink", unlink)
        loop.run(images, tmp_path, settings, SILENT, force=True)
    with pytest.raises(CannotCreate, match="other settings"):
        loop.run(images, tmp_path, settings, SILENT)
    loop.run(images, tmp_path, settings, SILENT, force=True)
    assert digests(tmp_path) == whole


def test_an_unfinished_run_is_refused_where_resuming_is_off(
    images: Images, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly):
        loop.run(images, tmp_path / "run", settings, SILENT)
    with pytest.raises(CannotCreate, match="unfinished"):
        loop.run(images, tmp_path / "run", settings, SILENT, resume=False)


def begin(images: Images, folder: Path, settings: RunSettings) -> None:
    """A run that is stopped as soon as it can be."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedEarly):
        patch.setattr(interrupt, "requested", lambda: True)
        loop.run(images, folder, settings, SILENT)


@pytest.mark.parametrize("change", ["gained", "lost", "moved"])
def test_a_run_whose_images_have_other_classes_by_now_is_refused(
    change: str, images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    """Half of its rows would lack what the others have."""
    moved = images.subset(np.arange(len(images)))
    assert images.truth_N is not None
    moved.truth_N = images.truth_N[::-1].copy()
    before, now = {
        "gained": (unlabelled(images), images),
        "lost": (images, unlabelled(images)),
        "moved": (images, moved),
    }[change]
    begin(before, tmp_path / "run", settings)
    with pytest.raises(CannotCreate, match=r"other true classes .*; choose another --out"):
        loop.run(now, tmp_path / "run", settings, SILENT)
    begin(before, tmp_path / "run", settings)


def test_a_run_of_an_earlier_version_which_noted_no_classes_goes_on(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    settings = replace(settings, opts=0)
    begin(images, tmp_path, settings)
    path = tmp_path / "run.json"
    earlier = json.loads(path.read_text())
    assert earlier.pop("classes")
    path.write_text(json.dumps(earlier))
    loop.run(images, tmp_path, settings, SILENT)
    assert (tmp_path / "rounds.csv").exists() and json.loads(path.read_text()) == earlier


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 3}'])
def test_a_damaged_note_of_a_run_is_named(
    text: str, images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadData, match=r"run\.json: damaged .*--force"):
        loop.run(images, tmp_path, settings, SILENT)


def test_a_run_of_one_image_has_no_knn_accuracy(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    """None can be held out."""
    settings = replace(settings, heads=(1,), opts=1)
    summary = loop.run(images.subset(np.arange(1)), tmp_path / "run", settings, SILENT)
    assert "knn" not in summary and "1 clusters of 1" in loop.text_of(summary)


def test_unlabelled_images_are_the_normal_case(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    summary = loop.run(unlabelled(images), tmp_path / "run", settings, SILENT)
    assert "knn" not in summary and not (tmp_path / "run" / "probe.h5").exists()
    assert "nmi" not in summary["heads"][0]
    assert "5 clusters of 12" in loop.text_of(summary)


@pytest.mark.slow
@pytest.mark.parametrize("relabel_heads", ["all", "cycle"])
def test_the_shell_loop_gives_the_same_digests(relabel_heads: str, tmp_path: Path) -> None:
    """examples/alternate.sh, a process a stage, against `sela run`: every payload is equal."""
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "DATA": "digits",
        "ARCH": "alexnet-small",
        "LIMIT": "48",
        "OUT": str(tmp_path / "shell"),
        "HEADS": "4,6",
        "EPOCHS": "2",
        "OPTS": "3",
        "VIEW": "random",
        "RELABEL_HEADS": relabel_heads,
        "TRAINING": "--batch-size 16 --lr 0.02 --aug paper --precision bfloat16",
    }
    script = Path(__file__).parents[1] / "examples" / "alternate.sh"
    subprocess.run(["bash", script], env=environment, check=True, capture_output=True, timeout=300)
    options = {
        "data": "digits", "limit": 48, "arch": "alexnet-small", "heads": "4,6", "epochs": 2,
        "opts": 3, "lamb": 10, "batch-size": 16, "lr": 0.02, "aug": "paper",
        "precision": "bfloat16", "view": "random", "relabel-heads": relabel_heads,
        "lr-milestones": "0.375,0.75,0.875", "weight-decay": 1e-5,
    }  # fmt: skip
    command = [
        "run",
        *(str(word) for key, value in options.items() for word in (f"--{key}", value)),
    ]
    subprocess.run(
        [tools / "sela", *command, "--out", tmp_path / "run"],
        env=environment,
        check=True,
        capture_output=True,
    )
    shell, run = digests(tmp_path / "shell"), digests(tmp_path / "run")
    assert shell and {name: run[name] for name in shell} == shell


@pytest.mark.parametrize(
    ("kind", "head_init", "heads"),
    [
        ("all", "random", [None] * 4),
        ("cycle", "random", ["0", "1", "2", "0"]),
        ("cycle", "kmeans", [None, "1", "2", "0"]),
    ],
)
def test_the_shell_loop_labels_the_heads_of_a_cycle(
    kind: str, head_init: str, heads: list[str | None], tmp_path: Path
) -> None:
    """A `sela` that only notes its words stands in."""
    stand_in = tmp_path / "sela"
    stand_in.write_text(
        '#!/bin/sh\necho "$*" >> "$LOG"\n'
        'if [ "$1" = schedule ]; then echo 0 1 2 3; exit; fi\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done\n'
    )
    stand_in.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "OUT": str(tmp_path / "shell"),
        "HEADS": "4x2,6",
        "RELABEL_HEADS": kind,
        "HEAD_INIT": head_init,
    }
    script = Path(__file__).parents[1] / "examples" / "alternate.sh"
    subprocess.run(["bash", script], env=environment, check=True, capture_output=True)
    solves = [line for line in (tmp_path / "log").read_text().splitlines() if "--init" in line]
    found = re.findall("--head ([0-9]+)", "\n".join(solves))
    assert len(solves) == 4 and found == [head for head in heads if head]


def test_in_a_cycle_each_round_labels_one_head(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    recipe = replace(settings.recipe, head_init="random")
    settings = replace(settings, relabel_heads="cycle", recipe=recipe)
    loop.run(images, tmp_path / "run", settings, SILENT)
    rounds = [
        formats.read_labels(str(tmp_path / "run" / f"labels-{number:03d}.h5"))
        for number in range(4)
    ]
    told = list(csv.DictReader((tmp_path / "run" / "rounds.csv").open()))
    for number in range(1, 4):
        chosen = (number - 1) % 2
        before, after = rounds[number - 1].heads, rounds[number].heads
        changed = (before[chosen].labels_N != after[chosen].labels_N).mean()
        assert float(told[number]["churn"]) == pytest.approx(changed)
        # Means over the heads that have been solved for: of the first round, of one.
        solved = after[:number]
        for name in ("residual", "objective", "n-iters"):
            mean = np.mean([head.attributes[name] for head in solved])
            assert float(told[number][name]) == pytest.approx(mean)
        assert after[chosen].attributes["assign"] == "balanced"
        assert not np.array_equal(before[chosen].labels_N, after[chosen].labels_N)
        kept = 1 - chosen
        assert np.array_equal(before[kept].labels_N, after[kept].labels_N)
        assert np.array_equal(before[kept].potentials_K, after[kept].potentials_K)
        assert before[kept].attributes["n-iters"] == after[kept].attributes["n-iters"]


def test_a_head_labelled_alone_has_the_labels_it_has_among_all(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    """The first round of a cycle is head 0 of the first round of all."""
    for kind in ("all", "cycle"):
        loop.run(images, tmp_path / kind, replace(settings, opts=2, relabel_heads=kind), SILENT)
    both, one = (
        formats.read_labels(str(tmp_path / kind / "labels-001.h5")).heads[0]
        for kind in ("all", "cycle")
    )
    assert np.array_equal(both.labels_N, one.labels_N)
    assert np.array_equal(both.potentials_K, one.potentials_K)


def test_a_network_that_learns_nothing_is_told_once(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    lines: list[str] = []
    still = replace(settings, recipe=replace(settings.recipe, lr=1e-9), opts=4)
    loop.run(images, tmp_path / "run", still, Watcher(no_progress, lines.append))
    told = [line for line in lines if "ln K" in line]
    assert len(told) == 1 and told[0].startswith("warning: the loss") and "--lr" in told[0]
    with (tmp_path / "run" / "rounds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert "loss about ln K" in rows[-1]["problems"] and not rows[0]["problems"]
    assert all(0 <= float(row["entropy"]) <= 1 and row["empty"] == "0" for row in rows)
    assert not (tmp_path / "run" / "predictions.json").exists()


def test_a_network_that_has_learned_nothing_in_the_end_is_told(
    images: Images, settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no round came late enough to see it, but not of random labels."""
    # Any loss is too high.
    monkeypatch.setattr(collapse, "_LEARNED", 1.0)
    for opts, told in ((4, 1), (2, 1), (0, 0)):
        lines: list[str] = []
        watcher = Watcher(no_progress, lines.append)
        loop.run(images, tmp_path / f"{opts}", replace(settings, opts=opts), watcher)
        assert sum("ln K" in line for line in lines) == told


# ---- a run that begins with a network from elsewhere -----------------------------


@pytest.fixture
def elsewhere(images: Images, tmp_path: Path) -> Checkpoint:
    """A network of other weights than a fresh one's, some way into a training with turns."""
    network = networks.build("alexnet-small", 32, [5, 8], seed=77, rotation=True)
    recipe = Recipe(batch_size=20, aug="none", rotation=True)
    settle(network, images, recipe)
    trainer = Trainer(network, recipe)
    trainer.run(images, [torch.arange(60) % clusters for clusters in (5, 8)], 2, lambda: None)
    path = str(tmp_path / "elsewhere.h5")
    formats.write_checkpoint(path, trainer.checkpoint(60), Provenance("train", {}), False)
    return formats.read_checkpoint(path)


def begun(start: Checkpoint, **options: Any) -> RunSettings:
    given = {name: value for name, value in OPTIONS.items() if name not in ("arch", "heads")}
    return settings_of("digits", None, given | options, start)


@pytest.mark.parametrize("options", [{}, {"head_init": "kmeans"}])
def test_a_run_begins_with_the_network_that_it_is_given(
    options: dict[str, Any], elsewhere: Checkpoint, images: Images, tmp_path: Path
) -> None:
    """Heads stay, though the preset has others for a fresh network, or are made anew."""
    folder = tmp_path / "run"
    settings = begun(elsewhere, epochs=0.0, opts=1, **options)
    loop.run(images, folder, settings, SILENT, start=elsewhere)
    first = formats.read_checkpoint(str(folder / "checkpoint.h5"))
    assert first.step == 0 and not len(first.losses) and not first.recipe["rotation"]
    for name, array in first.model.items():
        kept = not options or not name.startswith("heads")
        assert np.array_equal(elsewhere.model[name], array) == kept
    assert first.model.keys() == {n for n in elsewhere.model if not n.startswith("rotation")}
    assert elsewhere.header and first.header
    assert elsewhere.header.digest in {step["digest"] for step in first.header.history}


def test_a_run_goes_on_with_the_network_that_it_began_with(
    elsewhere: Checkpoint, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = begun(elsewhere, epochs=1.0, opts=2)
    with monkeypatch.context() as crashing, pytest.raises(KeyboardInterrupt):
        crashing.setattr(loop, "train_stage", mock.Mock(side_effect=KeyboardInterrupt))
        loop.run(images, tmp_path / "run", settings, SILENT, start=elsewhere)
    with pytest.raises(CannotCreate, match="other settings"):
        loop.run(images, tmp_path / "run", replace(settings, start=""), SILENT)
    loop.run(images, tmp_path / "run", settings, SILENT, start=elsewhere)
    loop.run(images, tmp_path / "whole", settings, SILENT, start=elsewhere)
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_run_does_not_replace_the_network_that_it_begins_with(
    images: Images, settings: RunSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    loop.run(images, folder, replace(settings, opts=0), SILENT)
    before = digests(folder)
    start = formats.read_checkpoint(str(folder / "checkpoint.h5"))
    with pytest.raises(UsageError, match="a file of the run"):
        loop.run(images, folder, begun(start), SILENT, force=True, start=start)
    assert digests(folder) == before


def test_heads_that_begin_as_clusters_are_all_labelled_at_first(
    elsewhere: Checkpoint, settings: RunSettings
) -> None:
    """In a cycle the others would learn random labels until it is their turn."""
    random, kmeans = (
        replace(
            settings, relabel_heads="cycle", recipe=replace(settings.recipe, head_init=head_init)
        )
        for head_init in HEAD_INITS
    )
    started = begun(elsewhere, relabel_heads="cycle")
    assert [random.head_of(number) for number in (1, 2, 3)] == [0, 1, 0]
    for known in (kmeans, started):
        assert [known.head_of(number) for number in (1, 2, 3)] == [None, 1, 0]
