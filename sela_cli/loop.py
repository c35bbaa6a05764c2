"""The alternating loop: label, train, label, ... Calls the stages, keeps nothing they do not write.

A run's folder holds, for round k = 1..n: checkpoint-k.h5 (trained up to that round's
position; only the newest is kept), logits.h5 (of that checkpoint) and labels-k.h5. Round
0 is the first network and random balanced labels. predictions.json says of each round what
the network predicted, and then all of its row of rounds.csv. At the end: checkpoint.h5,
labels.h5 (those of round n), probe.h5 and rounds.csv. What is there is not made again, so
that the same call goes on after an interruption.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sela_cli import (
    collapse,
    formats,
    interrupt,
    job,
    metrics,
    outputs,
    parallel,
    probes,
)
from sela_cli.envelope import Provenance
from sela_cli.errors import StoppedEarly, UsageError
from sela_cli.formats import Checkpoint, Labels
from sela_cli.fresh import fit_heads, make_ready
from sela_cli.images.augment import DrawOf
from sela_cli.images.batches import Images
from sela_cli.labels import label_stage, warning
from sela_cli.logits import embed_stage
from sela_cli.networks import Network
from sela_cli.precision import faster
from sela_cli.progress import Progress
from sela_cli.recipe import PRECISIONS
from sela_cli.run_folder import claim, held, is_own, own_files, precision_of, write_json
from sela_cli.run_settings import RunSettings, check_heads
from sela_cli.spread import spread
from sela_cli.training import label_view, network_of, train_stage

HOLDOUT = 0.2
# Images that the kNN accuracy of a run is taken of, at most.
KNN_IMAGES = 50_000
_PREDICTIONS = "predictions.json"


def text_of(summary: dict[str, Any]) -> str:
    """The result of a run for people."""
    rounds = "1 round" if summary["rounds"] == 1 else f"{summary['rounds']} rounds"
    lines = [
        f"{summary['images']} images, {rounds}, {summary['epochs']:g} epochs, "
        f"loss of the last epoch {summary['loss']:.3f}"
    ]
    if "knn" in summary:
        lines.append(metrics.table(summary["heads"]))
        knn = summary["knn"]
        lines.append(f"kNN accuracy {knn['trained']:.4f} (before training {knn['fresh']:.4f})")
    else:
        for number, head in enumerate(summary["heads"]):
            lines.append(f"head {number}: {metrics.sizes_text(head)}")
    lines += [f"{name:<14} {path}" for name, path in summary["files"].items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Watcher:
    """How the loop is watched: a progress context for each stage, and a line a round.

    `record` gets (name, value, step): the loss and learning rate of every step once its
    round is done, and the columns of rounds.csv.
    """

    stage: Callable[[str], AbstractContextManager[Progress]]
    say: Callable[[str], None]
    record: Callable[[str, float, int], None] = lambda name, value, step: None


def run(
    images: Images,
    folder: Path,
    settings: RunSettings,
    watcher: Watcher,
    *,
    device: str = "cpu",
    force: bool = False,
    resume: bool = True,
    start: Checkpoint | None = None,
) -> dict[str, Any]:
    """Run, or go on with, the loop in `folder`; returns a summary of the result.

    `start`: the checkpoint that it begins with, which `settings_of` was given too.
    Raises CannotCreate where the folder holds files named as a run's and no run, or a finished
    run or one with other settings and `force` is off; UsageError where a head has more
    clusters than there are images; StoppedEarly after a signal.
    """
    check_heads(images, settings)
    assert settings.start == (start.header.digest if start and start.header else "")
    if start and start.header and is_own(folder, start.header.path):
        raise UsageError(
            f"{start.header.path} is a file of the run in {folder}", "choose another --out"
        )
    with ExitStack() as stack:
        job.once(partial(stack.enter_context, held(folder)))
        settings = _measured(images, settings, device, None if force else precision_of(folder))
        job.once(partial(claim, images, folder, settings, force, resume))
        return _Run(images, folder, settings, watcher, device, start).to_the_end()


def _measured(
    images: Images, settings: RunSettings, device: str, begun_in: str | None
) -> RunSettings:
    """`--precision auto` decided: what the run has begun in, or the faster one."""
    recipe = settings.recipe
    if recipe.precision != "auto":
        return settings
    # Others may not see the file of the first process yet.
    chosen = next((name for name in PRECISIONS if parallel.first_says(begun_in == name)), None)
    if chosen is None:
        network = settings.network()
        chosen = faster(network, recipe.views(len(images)), device, training=True)
    return replace(settings, recipe=replace(recipe, precision=chosen))


@dataclass
class _Run:
    images: Images
    folder: Path
    settings: RunSettings
    watcher: Watcher
    device: str
    start: Checkpoint | None
    # Problems of the last round: each is told when it begins.
    told: set[str] = field(default_factory=set)
    # When this call ended its first round, and at which position.
    mark: tuple[float, float] | None = None
    # The path of the newest checkpoint, and what is there.
    newest: tuple[str, Checkpoint, Network] | None = None
    # What it begins with, until that lies in a file.
    first: tuple[Network, Checkpoint | None] | None = None

    @property
    def has_knn(self) -> bool:
        """Whether kNN accuracy is measured: it takes classes, and images to hold out."""
        return self.images.truth_N is not None and len(self.images) > 1

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def has(self, pattern: str) -> bool:
        """Whether the first process sees such files: of a disk that several machines share the
        others may see them later, and all are to go the same way."""
        return parallel.first_says(bool(own_files(self.folder, pattern)))

    def to_the_end(self) -> dict[str, Any]:
        positions = self.settings.positions
        if not self.has("labels-000.h5"):
            self._begin(*self._first())
        if not self.has("checkpoint*.h5"):
            self._train(*self._first(), 0, "checkpoint-000.h5", 0.0)
        # Neither is needed again, and both may be large.
        self.first = self.start = None
        if self.has_knn:
            self._knn("probe-000.h5", "checkpoint-000.h5")
        for number, position in enumerate(positions, start=1):
            if not self.has(f"labels-{number:03d}.h5"):
                self._round(number, position)
        last = len(positions)
        if not self.has("checkpoint.h5"):
            self._go_on(last, "checkpoint.h5", None)
            losses = formats.read_checkpoint(self.path("checkpoint.h5")).losses
            self._record_training(losses, last)
            end = self._loss(self.settings.recipe.epochs, losses)
            if advice := collapse.nothing_learned(*end):
                labels = formats.read_labels(self.path(f"labels-{last:03d}.h5"))
                # Random ones are not learned so soon, nor meant to be.
                if all(head.attributes["assign"] != "random" for head in labels.heads):
                    self._tell(advice)
        job.once(partial(self._copy_labels, last))
        if self.has_knn:
            self._knn("probe.h5", "checkpoint.h5")
        rounds = self._rounds()
        job.once(partial(self._finish, rounds))
        return self._summary(rounds)

    def _copy_labels(self, number: int) -> None:
        with outputs.replacing(self.path("labels.h5"), force=True) as copy:
            shutil.copyfile(self.path(f"labels-{number:03d}.h5"), copy)

    def _finish(self, rounds: list[dict[str, Any]]) -> None:
        # The run's own lock is `.lock`; of others a killed process may have left.
        for pattern in ("checkpoint-*.h5", "*.unfinished", "*.lock", "*.partial"):
            for leftover in own_files(self.folder, pattern):
                leftover.unlink()
        # A folder that has it is not gone on with; without it the predictions are needed.
        _write_rounds(self.path("rounds.csv"), rounds)
        (self.folder / _PREDICTIONS).unlink(missing_ok=True)

    def _first(self) -> tuple[Network, Checkpoint | None]:
        """The network to begin with, ready for the images, and its checkpoint if it has one."""
        if self.first is None:
            settings, start, recipe = self.settings, self.start, self.settings.recipe
            network = settings.network()
            with self.watcher.stage("first network") as progress:
                if start is None:
                    make_ready(network, self.images, recipe, self.device, progress)
                else:
                    start = self._as_first(start, network, progress)
            self.first = network, start
        return self.first

    def _as_first(self, start: Checkpoint, network: Network, progress: Progress) -> Checkpoint:
        """A checkpoint's network, but none of the training that it comes from."""
        assert start.header is not None
        arrays = {k: v for k, v in start.model.items() if not k.startswith("rotation.")}
        network.load_arrays(arrays, start.header.path)
        recipe = self.settings.recipe
        if recipe.head_init == "kmeans":
            fit_heads(network, self.images, recipe.seed, self.device, progress)
        none = np.empty(0, np.float32)
        return replace(
            start, model=network.arrays(), optimizer={}, step=0, epoch=0.0, recipe={}, losses=none
        )

    def _begin(self, network: Network, start: Checkpoint | None) -> None:
        """Round 0: random balanced labels; the logits of the first network name the images."""
        settings = self.settings
        provenance = Provenance("embed", {"arch": settings.arch})
        if start:
            assert start.header is not None
            provenance = provenance.reading("checkpoint", start.header)
        self._embed("embed, first network", network, provenance, None)
        self._keep(0, self._predictions)
        random = replace(settings.labels, assign="random").as_used()
        self._label(
            self.path("labels-000.h5"),
            lambda output: label_stage(self.path("logits.h5"), output, random, force=True),
        )
        self._keep(0, partial(self._describe, 0))

    def _label(self, labels: str, solve: Callable[[str], Labels]) -> Labels:
        """What `solve` writes to the path that it is given, in `labels` once it is whole.

        Labels of a solve that a signal cut short never lie there. Every process of a job
        solves; the first one's file counts.
        """
        own = f"{labels}.{parallel.rank()}.unfinished"
        solved = solve(own)
        stopped = parallel.any_of(interrupt.requested())
        if not stopped:
            job.once(partial(os.replace, own, labels))
        Path(own).unlink(missing_ok=True)
        if stopped:
            raise StoppedEarly(f"{self.folder}: stopped while labelling", "run it again")
        return solved

    def _round(self, number: int, position: float) -> None:
        settings = self.settings
        checkpoint = f"checkpoint-{number:03d}.h5"
        labels = self.path(f"labels-{number:03d}.h5")
        before = self.path(f"labels-{number - 1:03d}.h5")
        if not self.has(checkpoint):
            self._go_on(number - 1, checkpoint, position)
        state, network = self._state(checkpoint)
        assert state.header is not None
        provenance = Provenance("embed", {"view": settings.view, "views": settings.views})
        self._embed(
            f"embed, round {number}",
            network,
            provenance.reading("checkpoint", state.header),
            label_view(settings.view, settings.recipe, state.step),
        )
        self._keep(number, self._predictions)
        logits, head = self.path("logits.h5"), settings.head_of(number)
        with self.watcher.stage(f"label, round {number}") as progress:

            def solve(output: str) -> Labels:
                return label_stage(
                    logits,
                    output,
                    settings.labels,
                    init=before,
                    head=head,
                    force=True,
                    device=self.device,
                    progress=progress,
                )

            solved = self._label(labels, solve)
        if problem := warning(solved, labels, head):
            self.watcher.say(f"warning: {problem.args[0]}")
        row = self._describe(number)
        self._keep(number, lambda: row)
        losses = state.losses[slice(*self._steps(number - 1))]
        if losses.size:
            row["loss"] = float(losses.mean())
        self.watcher.say(_round_line(row, len(settings.positions)) + self._time_left(position))
        self._tell(self._problems(row, state.losses))
        self._record_training(state.losses, number - 1)
        for name, value in row.items():
            self.watcher.record(f"round/{name}", value, state.step)
        self._forget(number - 1)

    def _time_left(self, position: float) -> str:
        """At the pace of whole rounds; a call's first one may have been half done before."""
        now = time.monotonic()
        if self.mark is None:
            self.mark = (now, position)
            return ""
        began, start = self.mark
        seconds = (now - began) / (position - start) * (self.settings.recipe.epochs - position)
        return f", {timedelta(seconds=round(seconds))} left"

    def _record_training(self, losses: np.ndarray, number: int) -> None:
        """The steps from round `number` to the next."""
        recipe, count = self.settings.recipe, len(self.images)
        for step in range(*self._steps(number)):
            self.watcher.record("train/loss", float(losses[step]), step)
            self.watcher.record("train/lr", recipe.lr_at(step, count), step)

    def _steps(self, number: int) -> tuple[int, int]:
        """First step on the labels of round `number`, and that of the next round."""
        recipe, count = self.settings.recipe, len(self.images)
        goals = [0.0, *self.settings.positions, recipe.epochs]
        return recipe.steps(goals[number], count), recipe.steps(goals[number + 1], count)

    def _embed(
        self, title: str, network: Network, provenance: Provenance, augment: DrawOf | None
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
                views=settings.views if augment else 1,
                force=True,
                progress=progress,
            )

    def _go_on(self, source: int, output: str, to: float | None) -> None:
        start, network = self._state(f"checkpoint-{source:03d}.h5")
        # Trained on, it is no longer that checkpoint's.
        self.newest = None
        self._train(network, start, source, output, to)

    def _state(self, name: str) -> tuple[Checkpoint, Network]:
        """A checkpoint and its network; kept, as the newest is embedded and then trained."""
        path = self.path(name)
        if self.newest is None or self.newest[0] != path:
            state = formats.read_checkpoint(path)
            self.newest = path, state, network_of(state, path)
        return self.newest[1:]

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
        title = f"train to epoch {goal:.1f}" if goal else "first network"
        labels = formats.read_labels(self.path(f"labels-{source:03d}.h5"))
        relabelled = f", {self._churn(source, labels):.0%} relabelled" if source else ""
        with self.watcher.stage(title) as progress:
            train_stage(
                self.images,
                labels,
                network,
                self.path(output),
                self.settings.recipe,
                start=start,
                to=to,
                device=self.device,
                force=True,
                ready=True,
                progress=lambda done, total, note: progress(done, total, note + relabelled),
            )

    def _churn(self, number: int, labels: Labels) -> float:
        """The share of labels that are others than a round before, of heads that were labelled."""
        before = formats.read_labels(self.path(f"labels-{number - 1:03d}.h5"))
        head = self.settings.head_of(number)
        labelled = slice(None) if head is None else slice(head, head + 1)
        return metrics.churn(before.heads[labelled], labels.heads[labelled])

    def _forget(self, number: int) -> None:
        """Labels are small and stay; of the checkpoints the newest is enough to go on from."""
        path = self.folder / f"checkpoint-{number:03d}.h5"
        job.once(partial(path.unlink, missing_ok=True))

    def _knn(self, output: str, checkpoint: str) -> None:
        if self.has(output):
            return
        state, network = self._state(checkpoint)
        assert state.header is not None
        # The cost grows with their square.
        images = self.images.subset(spread(len(self.images), KNN_IMAGES))
        bank, test = probes.holdout(images, HOLDOUT, self.settings.recipe.seed)
        parameters = {
            "method": "knn",
            "holdout": HOLDOUT,
            "seed": self.settings.recipe.seed,
            "limit": KNN_IMAGES,
            "precision": self.settings.recipe.precision,
            "knn": asdict(probes.KnnRecipe()),
        }
        with self.watcher.stage(f"kNN of {checkpoint}") as progress:
            probes.probe_stage(
                bank,
                test,
                network,
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
        row["churn"] = self._churn(number, labels) if number else float("nan")
        # In a cycle some are still the random ones of the start.
        solved = [head for head in labels.heads if head.attributes["assign"] != "random"]
        for name in ("residual", "objective", "n-iters"):
            values = [head.attributes[name] for head in solved or labels.heads]
            row[name] = float(np.mean(values))
        sizes = [metrics.sizes(head) for head in labels.heads]
        row["smallest"] = min(size["smallest"] for size in sizes)
        row["largest"] = max(size["largest"] for size in sizes)
        row["empty"] = sum(size["empty"] for size in sizes)
        row |= self._kept()[str(number)]
        if self.images.truth_N is not None:
            scores = [
                metrics.agreement(head.labels_N, self.images.truth_N) for head in labels.heads
            ]
            for name in ("nmi", "ari"):
                row[name] = float(np.mean([score[name] for score in scores]))
        return row

    def _predictions(self) -> dict[str, Any]:
        """What logits.h5 says, which the next round replaces."""
        return collapse.predictions(self.path("logits.h5"), self.device)

    def _kept(self) -> dict[str, dict[str, Any]]:
        path = self.folder / _PREDICTIONS
        return json.loads(path.read_text()) if path.exists() else {}

    def _keep(self, number: int, make: Callable[[], dict[str, Any]]) -> None:
        """Note of a round what `make` gives, in place of what was noted."""
        path = self.folder / _PREDICTIONS
        job.once(lambda: write_json(path, self._kept() | {str(number): make()}))

    def _problems(self, row: dict[str, Any], losses: np.ndarray) -> dict[str, str]:
        """What looks wrong in a round that begins after these losses."""
        progress = row["epoch"] / max(self.settings.recipe.epochs, 1e-9)
        return collapse.problems(row, *self._loss(row["epoch"], losses), progress)

    def _loss(self, epoch: float, losses: np.ndarray) -> tuple[float, float]:
        """Mean loss of the epoch that ends there, and that of a network that knows nothing."""
        recipe, count = self.settings.recipe, len(self.images)
        end = recipe.steps(epoch, count)
        mean = _mean(losses[max(0, end - recipe.steps_per_epoch(count)) : end])
        return mean, float(np.mean(np.log(self.settings.heads)))

    def _tell(self, problems: dict[str, str]) -> None:
        """Say those that were not there before."""
        for name, advice in problems.items():
            if name not in self.told:
                self.watcher.say(f"warning: {advice}")
        self.told = set(problems)

    def _rounds(self) -> list[dict[str, Any]]:
        """All rows of rounds.csv; `loss` is the mean from that round to the next."""
        kept = self._kept()
        # A process that was killed, or of an older version, kept only the predictions.
        rows = [
            kept[str(number)] if "round" in kept[str(number)] else self._describe(number)
            for number in range(len(self.settings.positions) + 1)
        ]
        losses = formats.read_checkpoint(self.path("checkpoint.h5")).losses
        for number, row in enumerate(rows):
            part = losses[slice(*self._steps(number))]
            row["loss"] = _mean(part)
            row["problems"] = "; ".join(self._problems(row, losses))
        return rows

    def _summary(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        labels = formats.read_labels(self.path("labels.h5"))
        checkpoint = formats.read_checkpoint(self.path("checkpoint.h5"))
        epoch = checkpoint.losses[-self.settings.recipe.steps_per_epoch(len(self.images)) :]
        summary: dict[str, Any] = {
            "images": len(self.images),
            "rounds": len(rounds) - 1,
            "epochs": checkpoint.epoch,
            "loss": _mean(epoch),
            "heads": [metrics.sizes(head) for head in labels.heads],
        }
        if self.images.truth_N is not None:
            for head, sizes in zip(labels.heads, summary["heads"], strict=True):
                sizes |= metrics.agreement(head.labels_N, self.images.truth_N)
        if self.has_knn:
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


def _mean(losses: np.ndarray) -> float:
    """NaN of none."""
    return float(losses.mean()) if losses.size else float("nan")


def _round_line(row: dict[str, Any], rounds: int) -> str:
    parts = [f"round {row['round']}/{rounds}", f"epoch {row['epoch']:.2f}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.3f}")
    parts.append(f"{row['churn']:.1%} relabelled")
    if row["empty"]:
        parts.append(f"{row['empty']} empty clusters")
    parts.append(f"entropy {row['entropy']:.2f}")
    if "nmi" in row:
        parts.append(f"NMI {row['nmi']:.3f}")
    return ", ".join(parts)


def _write_rounds(path: str, rounds: list[dict[str, Any]]) -> None:
    with outputs.replacing(path, force=True) as file, file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rounds[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounds)
