"""What the method learns, in small: runs, ablations and probes, to docs/results-*.md.

    python benchmarks/results.py run cifar10 --train CIFAR/train --test CIFAR/test --out runs/r
    python benchmarks/results.py run cifar10 ... --arch alexnet     # the paper's architecture
    python benchmarks/results.py run whole --train CIFAR/train --test CIFAR/test --out runs/r \
        --epochs 230 --opts 46          # all 50,000 images: on a GPU; 0 and 0: as it begins
    python benchmarks/results.py run whole ... --epochs 230 --opts 46 --retrain 100  # its labels
    python benchmarks/results.py write --out runs/r

Folders of CIFAR-10 with a subfolder for each class. Every experiment has a folder of its
own with what `sela` wrote and `record.json`, its commands and seconds; one whose record is
there is not run again. `write` reads the records and the probe files only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sela_cli import formats
from sela_cli.envelope import Provenance
from sela_cli.formats import HeadLabels, Labels
from sela_cli.images.batches import open_images
from sela_cli.machine import processor

SEEDS = (0, 1, 2)
# Group of runs, variant and seed of an experiment's folder.
_NAME = re.compile(r"cifar10-((?:alexnet-)?\d+)-(.+)-(\d+)")
LIMIT = 10_000
# examples/cifar10.sh, and beside it variants and controls of as many steps.
NETWORK = "--image-size 32 --precision bfloat16 --lr-schedule cosine"
NETWORK += " --weight-decay 0.0005 --aug paper"
# What is probed of each: the paper's linear conv5, and of ResNet-18 what corresponds to it.
LAYERS = {"resnet18": "layer4", "alexnet": "conv5"}
TITLES = {"resnet18": "ResNet-18", "alexnet": "AlexNet"}
SELA = "--relabel linear --relabel-heads all"
VARIANTS = {
    "sela": "--heads 128x10 --opts {} --view random",
    "argmax": "--heads 128x10 --opts {} --view random --assign argmax",
    "centre": "--heads 128x10 --opts {} --view centre",
    "views": "--heads 128x10 --opts {} --view random --views 4",
    "often": "--heads 128x10 --opts {often} --view random",
    "kmeans": "--heads 128x10 --opts {} --view random --head-init kmeans",
    "one-head": "--heads 128x1 --opts {} --view random",
    "five-heads": "--heads 128x5 --opts {} --view random",
    "opts0": "--heads 128x10 --opts 0 --view random",
}
# What follows another in a chain is made from its labels.
CHAINS = (
    ("sela", "retrained"), ("argmax",), ("one-head",), ("five-heads",), ("opts0",), ("often",),
    ("centre",), ("views",), ("kmeans",), ("supervised",), ("fresh",),
)  # fmt: skip
NAMES = {
    "fresh": "as it begins",
    "sela": "ten heads of 128 clusters and as many relabellings as epochs, exactly balanced, by "
    "random views",
    "argmax": "labels as the potentials have them",
    "centre": "labels by the centre view",
    "views": "labels by the mean over four random views",
    "often": "three times as many relabellings",
    "kmeans": "heads that begin as clusters of the fresh features",
    "one-head": "T = 1",
    "five-heads": "T = 5",
    "opts0": "random labels to the end",
    "retrained": "a fresh network on the final labels of *sela*",
    "supervised": "on the true classes",
}
PAIRS = (
    ("sela", "fresh"), ("sela", "argmax"), ("sela", "centre"), ("views", "sela"),
    ("sela", "one-head"), ("five-heads", "one-head"), ("kmeans", "sela"), ("sela", "opts0"),
    ("often", "sela"), ("retrained", "sela"), ("supervised", "sela"),
)  # fmt: skip
# All images, on a GPU: examples/cifar10.sh with ON=gpu.
WHOLE = "--arch resnet18 --image-size 32 --precision bfloat16 --batch-size 256 --lr 0.1"
WHOLE += " --lr-schedule cosine --relabel linear --relabel-heads all --assign argmax"
WHOLE += " --store features --dtype float16"
# Epochs and relabellings of a run of all images and, of one on its last labels, of that.
_WHOLE_NAME = re.compile(r"whole-(\d+)-(\d+)(?:-retrained-(\d+))?")
SOME = f"{LIMIT:,} training images evenly spread"
PROBE = "--method both --epochs 10 --lr 0.01,0.03,0.1 --aug crop-flip --precision bfloat16"


class Experiment:
    """A folder, and the `sela` commands whose output lies in it."""

    def __init__(self, folder: Path, data: Path, test: Path) -> None:
        self.folder, self.data, self.test = folder, data, test
        self.commands: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> bool:
        return (self.folder / "record.json").exists()

    def sela(self, command: str) -> None:
        """One command; it goes on where an earlier try was stopped."""
        print(f"{self.folder.name}: sela {command}", flush=True)
        began = time.perf_counter()
        words = [sys.executable, "-m", "sela_cli", *shlex.split(command)]
        with (self.folder / "log.txt").open("a") as log:
            subprocess.run(words, check=True, stdout=log, stderr=log)
        seconds = round(time.perf_counter() - began, 1)
        self.commands.append({"command": self.neutral(command), "seconds": seconds})

    def neutral(self, command: str) -> str:
        for path, name in ((self.folder, "DIR"), (self.data, "TRAIN"), (self.test, "TEST")):
            command = command.replace(str(path), name)
        return command

    def probe(self, checkpoint: Path, layer: str, seed: int, limit: int | None = None) -> None:
        some = f"--limit {limit} " if limit else ""
        self.sela(
            f"probe --data {self.data} --test {self.test} {some}-c {checkpoint} "
            f"--layers {layer} {PROBE} --seed {seed} -o {self.folder}/test.h5 --force"
        )

    def finish(self) -> None:
        record = {
            "commands": self.commands,
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "torch": torch.__version__,
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "machine": machine(),
        }
        (self.folder / "record.json").write_text(json.dumps(record, indent=1))


def machine() -> str:
    """Processor and GPU."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor()}, Python {platform.python_version()}"


def commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def write_truth(spec: Path, image_size: int, output: Path) -> None:
    """The true classes as a labels file of one head, for the supervised control."""
    images, _ = open_images(str(spec), image_size, limit=LIMIT)
    assert images.truth_N is not None
    classes = int(images.truth_N.max()) + 1
    head = HeadLabels(
        images.truth_N.astype(np.int32), np.zeros(classes), formats.unsolved("balanced")
    )
    labels = Labels(images.keys, images.index_N, [head])
    formats.write_labels(
        str(output), labels, Provenance("label", {}, dataset_id=images.dataset_id), force=True
    )


def run_cifar10(arguments: argparse.Namespace) -> None:
    """The variants and controls of one run, several at a time, for every seed."""
    chains = [(chain, seed) for chain in CHAINS for seed in arguments.seeds]

    def run(chain: tuple[tuple[str, ...], int]) -> None:
        for name in chain[0]:
            if name in arguments.names:
                run_variant(arguments, name, chain[1])

    with ThreadPoolExecutor(arguments.jobs) as pool:
        deque(pool.map(run, chains), 0)


def run_variant(arguments: argparse.Namespace, name: str, seed: int) -> None:
    """One network, and its probes."""
    arch, epochs = arguments.arch, arguments.epochs
    recipe = f"--arch {arch} {NETWORK} {arguments.batch}"
    data = f"--data {arguments.train} --limit {LIMIT}"
    group = f"cifar10-{epochs}" if arch == "resnet18" else f"cifar10-{arch}-{epochs}"
    folder = arguments.out / f"{group}-{name}-{seed}"
    part = Experiment(folder, arguments.train, arguments.test)
    if part.done:
        return
    checkpoint = part.folder / "run/checkpoint.h5"
    if name in ("retrained", "supervised"):
        labels = arguments.out / f"{group}-sela-{seed}/run/labels.h5"
        if name == "supervised":
            labels = part.folder / "truth.h5"
            write_truth(part.data, 32, labels)
        checkpoint = part.folder / "checkpoint.h5"
        part.sela(
            f"retrain {data} --labels {labels} {recipe} "
            f"--epochs {epochs} --seed {100 + seed} -o {checkpoint} --force"
        )
    else:
        length, options = f"--epochs {epochs}", VARIANTS.get(name, "--heads 128x10 --opts 0")
        if name == "fresh":
            length = "--epochs 0"
        options = options.format(epochs, often=3 * epochs)
        part.sela(
            f"run {data} --preset cifar10 {recipe} {length} {options} {SELA} "
            f"--seed {seed} --out {part.folder}/run"
        )
    part.probe(checkpoint, LAYERS[arch], seed, LIMIT)
    part.finish()


def run_whole(arguments: argparse.Namespace) -> None:
    """A ResNet-18 self-labelled for so long, of all images; a fresh one on its last labels."""
    epochs, opts, again = arguments.epochs, arguments.opts, arguments.retrain
    part = Experiment(arguments.out / f"whole-{epochs}-{opts}", arguments.train, arguments.test)
    if not part.done:
        part.sela(
            f"run --data {part.data} --preset cifar10 {WHOLE} --epochs {epochs} "
            f"--opts {opts} --out {part.folder}/run"
        )
        finish_whole(part, part.folder / "run/checkpoint.h5")
    if not again:
        return
    labels = part.folder / "run/labels.h5"
    folder = arguments.out / f"{part.folder.name}-retrained-{again}"
    part = Experiment(folder, arguments.train, arguments.test)
    if not part.done:
        part.sela(
            f"retrain --data {part.data} --labels {labels} --arch resnet18 {NETWORK} "
            f"--batch-size 128 --lr 0.1 --epochs {again} --seed 100 "
            f"-o {folder}/checkpoint.h5 --force"
        )
        finish_whole(part, folder / "checkpoint.h5")


def finish_whole(part: Experiment, checkpoint: Path) -> None:
    """The probes, and the record."""
    part.probe(checkpoint, LAYERS["resnet18"], 0)
    part.sela(
        f"probe --protocol knn --data {part.data} --test {part.test} "
        f"-c {checkpoint} -o {part.folder}/knn.h5 --force"
    )
    part.finish()


def measured(folder: Path) -> dict[str, float]:
    """Per cent right on the test images by each probe, NMI of the last labels, minutes."""
    rows = [row for row in formats.read_probe(str(folder / "test.h5")) if row["split"] == "test"]
    found = {row["method"]: 100 * row["top1"] for row in rows}
    rounds = folder / "run/rounds.csv"
    found["nmi"] = float("nan")
    if rounds.exists():
        last = list(csv.DictReader(rounds.open()))[-1]
        found |= {"nmi": float(last["nmi"]), "largest": float(last.get("largest", "nan"))}
        found["empty"] = float(last.get("empty", "nan"))
    record = json.loads((folder / "record.json").read_text())
    found["minutes"] = record["commands"][0]["seconds"] / 60
    return found


def over_seeds(out: Path, name: str, seeds: Sequence[int]) -> dict[str, list[float]]:
    """The figures of a variant, a list over its seeds."""
    parts = [measured(out / f"{name}-{seed}") for seed in seeds]
    return {key: [part[key] for part in parts] for key in parts[0]}


def mean(values: list[float], digits: int = 1) -> str:
    """Mean and, of several, the range."""
    if not np.isfinite(values).all():
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def difference(
    rows: dict[str, dict[str, list[float]]], seeds: dict[str, list[int]], one: str, other: str
) -> str:
    """How much better one variant is than another, by the seeds that both have."""
    parts = []
    common = sorted({*seeds[one]} & {*seeds[other]})

    def of(name: str, key: str) -> list[float]:
        return [rows[name][key][seeds[name].index(seed)] for seed in common]

    for key, unit in (("knn", "kNN"), ("linear", "linear"), ("nmi", "NMI")):
        by_seed = np.subtract(of(one, key), of(other, key))
        if np.isfinite(by_seed).all():
            digits = 3 if key == "nmi" else 1
            parts.append(f"{unit} " + ", ".join(f"{value:+.{digits}f}" for value in by_seed))
    return f"- {one} less {other}: {'; '.join(parts)}."


def write(arguments: argparse.Namespace) -> None:
    """The pages whose records are there."""
    out: Path = arguments.out
    records = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/record.json")}
    whole = {name: records.pop(name) for name in list(records) if name.startswith("whole-")}
    if whole:
        _write(arguments.folder / "results-cifar10-whole.md", whole_page(out, whole))
    for group in {found[1] for name in records if (found := _NAME.fullmatch(name))}:
        _write(arguments.folder / f"results-cifar10-{group}.md", cifar10_page(out, records, group))


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines), encoding="utf-8")


def heading(title: str, records: dict[str, Any], images: str = SOME) -> list[str]:
    """Title, and what was measured on what."""
    return [
        f"# {title}",
        "",
        "Written by `python benchmarks/results.py write` from the probe files of "
        "`python benchmarks/results.py run`.",
        "",
        f"CIFAR-10 (JPEG copies, about 30 dB from the originals: not comparable with published "
        f"figures beyond direction), {images}, tested on all test "
        f"images, which chose nothing. {when_and_where(records)} *kNN*: weighted, "
        "k = 10, sigma = 0.1, per cent right. "
        "*linear*: a linear probe of the named layer, 10 epochs, its rate chosen on a tenth of the "
        "training images. *NMI*: of the labels of the last round with the classes, mean of heads. "
        "*minutes* are those that passed, other work included: of the last try, where a run was "
        "stopped and went on.",
        "",
    ]


def when_and_where(records: dict[str, Any]) -> str:
    """Dates, machine, versions and commits."""
    dates, machines, threads, versions, commits = (
        ", ".join(sorted({record[key] for record in records.values()}))
        for key in ("date", "machine", "threads", "torch", "commit")
    )
    return f"{dates}, {machines}, threads: {threads}, torch {versions}, commit {commits}."


def commands(records: dict[str, Any], out: Path) -> list[str]:
    """What was run, in a block."""
    lines = ["", "## Commands", "", "```sh"]
    for name in sorted(records):
        lines.append(f"# {name}")
        for command in records[name]["commands"]:
            line = command["command"].removeprefix("sela ").replace(str(out), "OUT")
            lines.append(line if line.startswith("examples") else f"sela {line}")
    return [*lines, "```", ""]


def cifar10_page(out: Path, records: dict[str, Any], group: str) -> list[str]:
    """Variants and controls, seed by seed, of one network and length."""
    *other, epochs = group.split("-")
    arch = other[0] if other else "resnet18"
    network, layer = TITLES[arch], LAYERS[arch]
    seeds: dict[str, list[int]] = {}
    parts = [found for folder in records if (found := _NAME.fullmatch(folder))]
    for name in NAMES:
        here = [int(part[3]) for part in parts if part[1] == group and part[2] == name]
        if here:
            seeds[name] = sorted(here)
    variants = {name: over_seeds(out, f"cifar10-{group}-{name}", seeds[name]) for name in seeds}
    if "fresh" in variants:
        # Its labels are random ones.
        variants["fresh"]["nmi"] = [float("nan")] * len(seeds["fresh"])
    lines = [
        *heading(
            f"CIFAR-10, {network}, {epochs} epochs",
            {f"{n}-{s}": records[f"cifar10-{group}-{n}-{s}"] for n in seeds for s in seeds[n]},
        ),
        f"{network} with a stem for 32 pixels, {epochs} epochs; mean and, of several seeds, range. "
        + "; ".join(f"*{name}*: {text}" for name, text in NAMES.items() if name in variants)
        + ".",
        "",
        f"| network | seeds | kNN | linear {layer} | NMI | largest cluster | empty | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in variants.items():
        sizes = " | "
        if name in VARIANTS:
            sizes = f"{max(row['largest']):.0f} | {max(row['empty']):.0f}"
        lines.append(
            f"| {name} | {', '.join(map(str, seeds[name]))} | {mean(row['knn'])} "
            f"| {mean(row['linear'])} | {mean(row['nmi'], 3)} | {sizes} | {mean(row['minutes'])} |"
        )
    lines += ["", "Seed by seed:", ""]
    lines += [difference(variants, seeds, *pair) for pair in PAIRS if set(pair) <= variants.keys()]
    first = {f"cifar10-{group}-{name}-{seeds[name][0]}" for name in variants}
    return lines + commands({name: records[name] for name in first}, out)


def whole_page(out: Path, records: dict[str, Any]) -> list[str]:
    """All images: networks that were self-labelled for longer and longer."""
    lines = [
        *heading("CIFAR-10, all images", records, "all 50,000 training images"),
        "The recipe of `examples/cifar10.sh` with `ON=gpu`: ResNet-18 with a stem for 32 pixels, "
        "ten heads of 128 clusters. One seed of each; after no epoch the network is as it begins. "
        "*on the labels of* such a run: a fresh network, by `sela retrain`. *within the training "
        "images*: the same kNN, of a fifth of them in the others, which `sela run` does by "
        "itself. Below, the paper's sweep.",
        "",
        "| network | kNN | linear layer4 | kNN within the training images | NMI | minutes | on |",
        "|---|---|---|---|---|---|---|",
    ]
    names = sorted(records, key=_lengths_of_whole)
    for name in names:
        row = measured(out / name)
        inside = nmi = ""
        if (own := out / name / "run/probe.h5").exists():
            inside = f"{100 * formats.read_probe(str(own))[0]['top1']:.1f}"
            nmi = f"{row['nmi']:.3f}" if _lengths_of_whole(name)[0] else ""
        on = records[name]["machine"].split(",")[0]
        lines.append(
            f"| {_whole_in_words(name)} | {row['knn']:.1f} | {row['linear']:.1f} "
            f"| {inside} | {nmi} | {row['minutes']:.1f} | {on} |"
        )
    found = {name: formats.read_probe(str(out / name / "knn.h5")) for name in names}
    lines += ["", f"| kNN | {' | '.join(map(_whole_in_words, names))} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for rows in zip(*found.values(), strict=True):
        shares = " | ".join(f"{100 * row['top1']:.1f}" for row in rows)
        lines.append(f"| {rows[0]['setting']} | {shares} |")
    return lines + commands({name: records[name] for name in names}, out)


def _lengths_of_whole(name: str) -> tuple[int, int, int]:
    found = _WHOLE_NAME.fullmatch(name)
    assert found
    return int(found[1]), int(found[2]), int(found[3] or 0)


def _whole_in_words(name: str) -> str:
    epochs, opts, again = _lengths_of_whole(name)
    run = f"{epochs} epochs, {opts} relabellings" if epochs else "0 epochs"
    return f"{again} epochs on the labels of {run}" if again else run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.add_argument("part", choices=["cifar10", "whole"])
    run.add_argument("--train", type=Path, required=True)
    run.add_argument("--test", type=Path, required=True)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--epochs", type=int, default=12)
    run.add_argument(
        "--names", nargs="+", default=list(NAMES), choices=list(NAMES), help="of cifar10"
    )
    run.add_argument("--arch", default="resnet18", choices=list(LAYERS), help="of cifar10")
    run.add_argument("--opts", type=int, default=46, help="of whole")
    run.add_argument("--retrain", type=int, help="of whole: epochs on the last labels")
    run.add_argument("--batch", default="--batch-size 64 --lr 0.05", help="of cifar10")
    run.add_argument("--jobs", type=int, default=1, help="of cifar10: at a time")
    run.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of cifar10")
    page = commands.add_parser("write")
    page.add_argument("--out", type=Path, required=True)
    page.add_argument("--folder", type=Path, default=Path("docs"))
    page.set_defaults(part="write")
    arguments = parser.parse_args()
    parts = {"cifar10": run_cifar10, "whole": run_whole, "write": write}
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
