"""The alternating loop: label, train, label, ... Calls the stages, keeps nothing they do not write.

A run's folder holds, for round k = 1..n: checkpoint-k.h5 (trained up to that round's
position; only the newest is kept), logits.h5 (of that checkpoint) and labels-k.h5. Round
0 is the fresh network and random balanced labels. At the end: checkpoint.h5, labels.h5
(those of round n), probe.h5 and rounds.csv. What is there is not made again, so that the
same call goes on after an interruption.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sela_cli import formats, interrupt, metrics, presets, probes, schedule
from sela_cli.errors import BadData, CannotCreate, StoppedEarly
from sela_cli.formats import Checkpoint, Provenance
from sela_cli.images.augment import ViewOf
from sela_cli.images.batches import Images
from sela_cli.labels import LabelSettings, label_stage, warning
from sela_cli.locks import locked
from sela_cli.logits import embed_stage
from sela_cli.logits import plan as embed_plan
from sela_cli.networks import Network, build, parse_heads
from sela_cli.training import Recipe, label_view, network_of, settle, train_stage

Progress = Callable[[int, int, str], None]
HOLDOUT = 0.2


@dataclass(frozen=True)
class RunSettings:
    """Every option of a run that changes its result."""

    arch: str
    image_size: int
    heads: tuple[int, ...]
    opts: int
    relabel: str
    recipe: Recipe
    labels: LabelSettings
    store: str = "logits"
    dtype: str = "float32"
    view: str = "centre"

    @property
    def positions(self) -> list[float]:
        """Where the images are relabelled, in epochs."""
        return schedule.relabel_positions(self.recipe.epochs, self.opts, self.relabel)

    def at(self, image_size: int) -> RunSettings:
        """The same for a network of this input size."""
        return replace(self, image_size=image_size)


def settings_of(
    preset_name: str | None, image_size: int | None, options: dict[str, Any]
) -> RunSettings:
    """A preset (or the defaults) with options over it. An image size of 0 is to be seen.

    Raises UsageError where an option has no meaning.
    """
    defaults: dict[str, Any] = {
        "arch": "alexnet",
        "heads": "128x10",
        "opts": 80,
        "relabel": "quadratic",
        "epochs": 160.0,
    }
    merged = defaults | presets.preset(preset_name) | options
    if image_size is not None:
        merged["image_size"] = image_size
    recipe = Recipe.of(merged)
    recipe.check()
    names = {field.name for field in fields(LabelSettings)}
    labels = LabelSettings(**{name: value for name, value in merged.items() if name in names})
    labels.check()
    return RunSettings(
        arch=merged["arch"],
        image_size=merged.get("image_size", 0),
        heads=tuple(parse_heads(merged["heads"])),
        opts=merged["opts"],
        relabel=merged["relabel"],
        recipe=recipe,
        labels=labels,
        store=merged.get("store", "logits"),
        dtype=merged.get("dtype", "float32"),
        view=merged.get("view", "centre"),
    )


def plan(images: Images, settings: RunSettings) -> tuple[dict[str, Any], str]:
    """What a dry run shows, as values and as text."""
    network = build(settings.arch, settings.image_size, list(settings.heads), settings.recipe.seed)
    count = len(images)
    shown = embed_plan(images, network, settings.store, settings.dtype) | {
        "rounds": len(settings.positions),
        "positions": settings.positions,
        "steps": settings.recipe.steps(settings.recipe.epochs, count),
        "settings": formats.through_json(asdict(settings)),
    }
    lines = [
        f"{count} images, {settings.arch} at {settings.image_size} pixels",
        f"heads {list(settings.heads)}",
        f"{shown['steps']} steps, {shown['rounds']} relabellings at epochs "
        + ", ".join(f"{position:.2f}" for position in settings.positions[:20])
        + (", ..." if len(settings.positions) > 20 else ""),
        f"{shown['megabytes']:.1f} MB of {settings.store} a round",
    ]
    lines += [f"{name} = {value}" for name, value in asdict(settings.recipe).items()]
    lines += [f"{name} = {value}" for name, value in asdict(settings.labels).items()]
    return shown, "\n".join(lines)


def text_of(summary: dict[str, Any]) -> str:
    """The result of a run for people."""
    lines = [
        f"{summary['images']} images, {summary['rounds']} rounds, {summary['epochs']:g} epochs, "
        f"loss of the last epoch {summary['loss']:.3f}"
    ]
    if "knn" in summary:
        lines.append(metrics.table(summary["heads"]))
        knn = summary["knn"]
        lines.append(f"kNN accuracy {knn['trained']:.4f} (fresh network {knn['fresh']:.4f})")
    else:
        for number, head in enumerate(summary["heads"]):
            lines.append(f"head {number}: {metrics.sizes_text(head)}")
    lines += [f"{name:<14} {path}" for name, path in summary["files"].items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Watcher:
    """How the loop is watched: a progress context for each stage, and a line a round."""

    stage: Callable[[str], AbstractContextManager[Progress]]
    say: Callable[[str], None]


def run(
    images: Images,
    folder: Path,
    settings: RunSettings,
    watcher: Watcher,
    device: str = "cpu",
    force: bool = False,
    resume: bool = True,
) -> dict[str, Any]:
    """Run, or go on with, the loop in `folder`; returns a summary of the result.

    Raises CannotCreate where the folder holds a finished run or one with other settings
    and `force` is off; StoppedEarly after a signal.
    """
    with _locked(folder):
        _claim(images, folder, settings, force, resume)
        return _Run(images, folder, settings, watcher, device).to_the_end()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except BlockingIOError:
            raise CannotCreate(
                f"{folder}: another `sela run` is at work there",
                "wait for it, or choose another --out",
            ) from None
        except OSError as error:
            raise CannotCreate(f"{folder}: {error.strerror}", "choose another --out") from error
        yield


def _claim(images: Images, folder: Path, settings: RunSettings, force: bool, resume: bool) -> None:
    """Make sure that what lies in the folder is a beginning of this very run."""
    path = folder / "run.json"
    identity = formats.through_json({"dataset-id": images.dataset_id, "settings": asdict(settings)})
    old = [*folder.glob("*.h5"), *folder.glob("*.unfinished"), *folder.glob("*.csv")]
    if force:
        for leftover in [path, *old]:
            leftover.unlink(missing_ok=True)
    elif path.exists():
        try:
            same = json.loads(path.read_text()) == identity
        except ValueError as error:
            raise BadData(f"{path}: damaged ({error})", "start over with --force") from error
        if not same:
            raise CannotCreate(
                f"{folder} holds a run with other settings or images",
                "choose another --out, or --force",
            )
        if not resume or (folder / "rounds.csv").exists():
            state = "a finished" if (folder / "rounds.csv").exists() else "an unfinished"
            raise CannotCreate(f"{folder} holds {state} run", "choose another --out, or --force")
    elif old:
        raise CannotCreate(f"{folder} holds other files", "choose another --out, or --force")
    with formats.replacing(str(path), force=True) as partial:
        partial.write_text(json.dumps(identity, indent=1))


@dataclass
class _Run:
    images: Images
    folder: Path
    settings: RunSettings
    watcher: Watcher
    device: str

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def to_the_end(self) -> dict[str, Any]:
        positions = self.settings.positions
        if not (self.folder / "labels-000.h5").exists():
            self._begin(self._fresh())
        if not any(self.folder.glob("checkpoint*.h5")):
            self._train(self._fresh(), None, 0, "checkpoint-000.h5", 0.0)
        if self.images.truth_N is not None:
            self._knn("probe-000.h5", "checkpoint-000.h5")
        for number, position in enumerate(positions, start=1):
            if not (self.folder / f"labels-{number:03d}.h5").exists():
                self._round(number, position)
        last = len(positions)
        if not (self.folder / "checkpoint.h5").exists():
            self._go_on(last, "checkpoint.h5", None)
        with formats.replacing(self.path("labels.h5"), force=True) as partial:
            shutil.copyfile(self.path(f"labels-{last:03d}.h5"), partial)
        if self.images.truth_N is not None:
            self._knn("probe.h5", "checkpoint.h5")
        rounds = self._rounds()
        for leftover in (*self.folder.glob("checkpoint-*.h5"), *self.folder.glob("*.unfinished")):
            leftover.unlink()
        # The last of all: a folder that has it is not gone on with.
        _write_rounds(self.path("rounds.csv"), rounds)
        return self._summary(rounds)

    def _fresh(self) -> Network:
        settings = self.settings
        return build(settings.arch, settings.image_size, list(settings.heads), settings.recipe.seed)

    def _begin(self, network: Network) -> None:
        """Round 0: random balanced labels; the logits of the fresh network name the images."""
        settings = self.settings
        settle(network, self.images, settings.recipe)
        provenance = Provenance("embed", {"arch": settings.arch})
        self._embed("embed, fresh network", network, provenance, None)
        random = replace(settings.labels, assign="random")
        label_stage(self.path("logits.h5"), self.path("labels-000.h5"), random, force=True)

    def _round(self, number: int, position: float) -> None:
        settings = self.settings
        checkpoint = f"checkpoint-{number:03d}.h5"
        labels = self.path(f"labels-{number:03d}.h5")
        before = self.path(f"labels-{number - 1:03d}.h5")
        if not (self.folder / checkpoint).exists():
            self._go_on(number - 1, checkpoint, position)
        state = formats.read_checkpoint(self.path(checkpoint))
        assert state.header is not None
        network = network_of(state, self.path(checkpoint))
        provenance = Provenance("embed", {"view": settings.view})
        self._embed(
            f"embed, round {number}",
            network,
            provenance.reading("checkpoint", state.header),
            label_view(settings.view, network, settings.recipe, state.step),
        )
        # Labels of a solve that a signal cut short must never lie there as those of the round.
        pending = f"{labels}.unfinished"
        with self.watcher.stage(f"label, round {number}") as progress:
            solved = label_stage(
                self.path("logits.h5"),
                pending,
                settings.labels,
                init=before,
                force=True,
                progress=progress,
            )
        if interrupt.requested():
            Path(pending).unlink()
            raise StoppedEarly(f"{self.folder}: stopped in round {number}", "run it again")
        os.replace(pending, labels)
        if problem := warning(solved, labels):
            self.watcher.say(f"warning: {problem.args[0]}")
        self.watcher.say(_round_line(self._describe(number), len(settings.positions)))
        self._forget(number - 1)

    def _embed(
        self, title: str, network: Network, provenance: Provenance, augment: ViewOf | None
    ) -> None:
        settings = self.settings
        with self.watcher.stage(title) as progress:
            embed_stage(
                self.images,
                network,
                self.path("logits.h5"),
                provenance.of(self.images.dataset_id),
                store=settings.store,
                dtype=settings.dtype,
                device=self.device,
                precision=settings.recipe.precision,
                augment=augment,
                force=True,
                progress=progress,
            )

    def _go_on(self, source: int, output: str, to: float | None) -> None:
        path = self.path(f"checkpoint-{source:03d}.h5")
        start = formats.read_checkpoint(path)
        self._train(network_of(start, path), start, source, output, to)

    def _train(
        self,
        network: Network,
        start: Checkpoint | None,
        source: int,
        output: str,
        to: float | None,
    ) -> None:
        """Train on the labels of round `source`."""
        goal = self.settings.recipe.epochs if to is None else to
        with self.watcher.stage(f"train to epoch {goal:.2f}") as progress:
            train_stage(
                self.images,
                formats.read_labels(self.path(f"labels-{source:03d}.h5")),
                network,
                self.path(output),
                self.settings.recipe,
                start=start,
                to=to,
                device=self.device,
                force=True,
                progress=progress,
            )

    def _forget(self, number: int) -> None:
        """Labels are small and stay; of the checkpoints the newest is enough to go on from."""
        (self.folder / f"checkpoint-{number:03d}.h5").unlink(missing_ok=True)

    def _knn(self, output: str, checkpoint: str) -> None:
        if (self.folder / output).exists():
            return
        state = formats.read_checkpoint(self.path(checkpoint))
        assert state.header is not None
        bank, test = probes.holdout(self.images, HOLDOUT, self.settings.recipe.seed)
        parameters = {"method": "knn", "holdout": HOLDOUT, "seed": self.settings.recipe.seed}
        with self.watcher.stage(f"kNN of {checkpoint}") as progress:
            probes.probe_stage(
                bank,
                test,
                network_of(state, self.path(checkpoint)),
                self.path(output),
                Provenance("probe", parameters, dataset_id=self.images.dataset_id).reading(
                    "checkpoint", state.header
                ),
                method="knn",
                split=f"holdout {HOLDOUT:g}",
                device=self.device,
                precision=self.settings.recipe.precision,
                force=True,
                progress=progress,
            )

    def _describe(self, number: int) -> dict[str, Any]:
        """One row of rounds.csv, derived from the files alone."""
        labels = formats.read_labels(self.path(f"labels-{number:03d}.h5"))
        positions = [0.0, *self.settings.positions]
        row: dict[str, Any] = {"round": number, "epoch": round(positions[number], 3)}
        row["churn"] = float("nan")
        if number:
            before = formats.read_labels(self.path(f"labels-{number - 1:03d}.h5"))
            row["churn"] = metrics.churn(before.heads, labels.heads)
        for name in ("residual", "objective", "n-iters"):
            row[name] = float(np.mean([head.attributes[name] for head in labels.heads]))
        row["smallest"] = min(metrics.sizes(head)["smallest"] for head in labels.heads)
        row["largest"] = max(metrics.sizes(head)["largest"] for head in labels.heads)
        if self.images.truth_N is not None:
            scores = [
                metrics.agreement(head.labels_N, self.images.truth_N) for head in labels.heads
            ]
            for name in ("nmi", "ari"):
                row[name] = float(np.mean([score[name] for score in scores]))
        return row

    def _rounds(self) -> list[dict[str, Any]]:
        """All rows of rounds.csv; `loss` is the mean from that round to the next."""
        rows = [self._describe(number) for number in range(len(self.settings.positions) + 1)]
        losses = formats.read_checkpoint(self.path("checkpoint.h5")).losses
        recipe, count = self.settings.recipe, len(self.images)
        goals = [0.0, *self.settings.positions, recipe.epochs]
        for row, start, end in zip(rows, goals[:-1], goals[1:], strict=True):
            part = losses[recipe.steps(start, count) : recipe.steps(end, count)]
            row["loss"] = float(part.mean()) if part.size else float("nan")
        return rows

    def _summary(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        labels = formats.read_labels(self.path("labels.h5"))
        checkpoint = formats.read_checkpoint(self.path("checkpoint.h5"))
        epoch = checkpoint.losses[-self.settings.recipe.steps_per_epoch(len(self.images)) :]
        summary: dict[str, Any] = {
            "images": len(self.images),
            "rounds": len(rounds) - 1,
            "epochs": checkpoint.epoch,
            "loss": float(epoch.mean()) if epoch.size else float("nan"),
            "heads": [metrics.sizes(head) for head in labels.heads],
        }
        if self.images.truth_N is not None:
            for head, sizes in zip(labels.heads, summary["heads"], strict=True):
                sizes |= metrics.agreement(head.labels_N, self.images.truth_N)
            summary["knn"] = {
                "fresh": formats.read_probe(self.path("probe-000.h5"))[0]["top1"],
                "trained": formats.read_probe(self.path("probe.h5"))[0]["top1"],
            }
        summary["files"] = {
            name: self.path(name)
            for name in ("labels.h5", "checkpoint.h5", "logits.h5", "probe.h5", "rounds.csv")
            if (self.folder / name).exists()
        }
        return summary


def _round_line(row: dict[str, Any], rounds: int) -> str:
    parts = [f"round {row['round']}/{rounds}", f"epoch {row['epoch']:.2f}"]
    parts.append(f"labels changed {row['churn']:.1%}")
    parts.append(f"residual {row['residual']:.1e} in {row['n-iters']:.0f} passes")
    parts.append(f"sizes {row['smallest']}..{row['largest']}")
    if "nmi" in row:
        parts.append(f"NMI {row['nmi']:.3f}")
    return ", ".join(parts)


def _write_rounds(path: str, rounds: list[dict[str, Any]]) -> None:
    with formats.replacing(path, force=True) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rounds[-1]))
        writer.writeheader()
        writer.writerows(rounds)
