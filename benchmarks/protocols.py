"""The paper's protocols on small real collections: probes, PASCAL VOC, imbalance.

    python benchmarks/protocols.py run --nette NETTE --voc VOC --resnet RESNET \
        --out runs/protocols
    python benchmarks/protocols.py write --out runs/protocols

NETTE holds `train` and `val` with a folder a class (Imagenette), VOC a `VOCdevkit`. One
network learns Imagenette by `sela run`; it and the fresh network it began as are probed
by the ImageNet protocols and fine-tuned on VOC, classification and detection. So are, but
for detection, the paper's AlexNet at 224 pixels, fresh, and a ResNet-18, by its pooled
features: fresh, and RESNET, the checkpoint of `benchmarks/results.py run whole`. Last,
examples/imbalance.py is run on handwritten digits. Every experiment has a folder of its
own with its results and `record.json`, its commands and seconds; one whose record is
there is not run again. `write` reads these folders only: docs/results-protocols.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from results import Experiment, when_and_where
from results import commands as all_commands

from sela_cli import formats, voc

RECIPE = "--precision bfloat16 --batch-size 64 --lr 0.03 --lr-schedule cosine"
RECIPE += " --weight-decay 0.0005 --aug paper --lamb 10 --relabel linear --view random"
RECIPE += " --head-init kmeans"
# What learns Imagenette, or is as it begins: the network, epochs and rounds of `sela run`.
SMALL = "--arch alexnet-small --image-size 64"
RUNS = {
    "fresh": (SMALL, 0, 0),
    "trained": (SMALL, 100, 30),
    "alexnet": ("--arch alexnet --image-size 224", 0, 0),
    "resnet": ("--arch resnet18 --image-size 32", 0, 0),
}
# What is probed and fine-tuned, the last from elsewhere.
TITLES = {
    "fresh": "small AlexNet, 64 pixels, fresh",
    "trained": "small AlexNet, 64 pixels, trained",
    "alexnet": "AlexNet, 224 pixels, fresh",
    "resnet": "ResNet-18, 32 pixels, fresh",
    "cifar10": "ResNet-18, 32 pixels, of CIFAR-10",
}
# Of which detectors are made.
DETECTORS = ("fresh", "trained")
CLASSIFICATION = "--iterations 200 --lr 0.01"
DETECTION = "--min-size 200 --iterations 600 --batch-size 4 --lr 0.02"
# Half the example's own.
IMBALANCE = "--data digits --epochs 20 --rounds 10"
SEEDS = (0, 1, 2)


class Protocol(Experiment):
    """An experiment that knows more folders, and runs other scripts than `sela` too."""

    def __init__(self, folder: Path, names: dict[str, Path]) -> None:
        super().__init__(folder, folder, folder)
        self.names = names | {"DIR": folder}

    def neutral(self, command: str) -> str:
        """The command without this machine's paths, the longest first."""
        for name, path in sorted(self.names.items(), key=lambda item: -len(str(item[1]))):
            command = command.replace(str(path), name)
        return command

    def script(self, path: str, options: str, output: Path) -> None:
        """A script of the repository; what it prints is kept."""
        began = time.perf_counter()
        words = [sys.executable, str(Path(__file__).parents[1] / path), *options.split()]
        output.write_text(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        seconds = round(time.perf_counter() - began, 1)
        self.commands.append({"command": self.neutral(f"{path} {options}"), "seconds": seconds})


def run(arguments: argparse.Namespace) -> None:
    """Whatever is not done yet."""
    out, nette, photos = arguments.out, arguments.nette, arguments.voc
    names = {"NETTE": nette, "VOC": photos, "RESNET": arguments.resnet, "OUT": out}
    checkpoints = {name: out / f"nette-{name}/run/checkpoint.h5" for name in RUNS}
    checkpoints["cifar10"] = arguments.resnet

    def once(name: str, work: Callable[..., None], *given: Any) -> None:
        experiment = Protocol(out / name, names)
        if not experiment.done:
            work(experiment, *given)
            experiment.finish()

    def learn(experiment: Protocol, network: str, epochs: int, rounds: int) -> None:
        experiment.sela(
            f"run --data {nette}/train {network} --heads 32x5 {RECIPE} --epochs {epochs} "
            f"--opts {rounds} --out {experiment.folder}/run"
        )

    def probe(experiment: Protocol, checkpoint: Path) -> None:
        for protocol in ("knn", "imagenet-linear"):
            experiment.sela(
                f"probe --data {nette}/train --test {nette}/val -c {checkpoint} "
                f"--protocol {protocol} -o {experiment.folder}/{protocol}.h5 --force"
            )

    def finetune(experiment: Protocol, checkpoint: Path, options: str) -> None:
        experiment.sela(
            f"finetune --data voc2007:{photos} -c {checkpoint} {options} "
            f"-o {experiment.folder}/precision.h5 --force"
        )

    def imbalance(experiment: Protocol, seed: int) -> None:
        # The example starts in new folders.
        shutil.rmtree(experiment.folder / "runs", ignore_errors=True)
        experiment.script(
            "examples/imbalance.py",
            f"{IMBALANCE} --seed {seed} --out {experiment.folder}/runs",
            experiment.folder / "table.txt",
        )

    for name, network_and_length in RUNS.items():
        once(f"nette-{name}", learn, *network_and_length)
    for name, checkpoint in checkpoints.items():
        once(f"probe-{name}", probe, checkpoint)
    for task, options, tuned in (
        ("classification", CLASSIFICATION, TITLES),
        ("detection", DETECTION, DETECTORS),
    ):
        for part in ("fc", "all"):
            for name in tuned:
                told = f"--task {task} {options} --train {part}"
                once(f"voc-{task}-{part}-{name}", finetune, checkpoints[name], told)
    for seed in SEEDS:
        once(f"imbalance-{seed}", imbalance, seed)


def page(out: Path) -> str:
    """What was done, all tables, and the commands."""
    records = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/record.json"))
    }
    lines = [
        "# The paper's protocols on small collections",
        "",
        "Written by `python benchmarks/protocols.py write` from the results of `python "
        f"benchmarks/protocols.py run`. {when_and_where(records)}",
        "",
        "Networks by the probes of the ImageNet protocol, on 1,000 images of Imagenette and 500 "
        "others: a small AlexNet that learned the 1,000 beside the fresh one, the paper's AlexNet "
        "fresh, and the pooled features of a ResNet-18, fresh and self-labelled on CIFAR-10 "
        "([all its images](results-cifar10-whole.md)). The same fine-tuned on 300 images of "
        "PASCAL VOC 2007 (200 others tested), *fc*: the last layers only; and "
        "`examples/imbalance.py`. Small collections and short runs: they show that everything "
        "runs, and little of the method. *minutes*: other work included.",
        "",
        tables(out),
    ]
    return "\n".join(lines + all_commands(records, out))


def tables(out: Path) -> str:
    """All tables in markdown, of the experiments that are done."""
    parts = [
        ("Imagenette, the ImageNet protocols", probe_rows(out)),
        ("PASCAL VOC 2007 subset", voc_rows(out)),
        ("Imbalanced digits: balanced labels against k-means", imbalance_rows(out)),
    ]
    return "\n\n".join(f"## {title}\n\n{rows}" for title, rows in parts if rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; nothing where it would have no row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def probe_rows(out: Path) -> str:
    """Linear accuracy of each layer and kNN, in percent, of all networks."""
    found: dict[str, dict[str, str]] = {}
    for name in TITLES:
        folder = out / f"probe-{name}"
        if (folder / "record.json").exists():
            rows = formats.read_probe(str(folder / "imagenet-linear.h5"))
            shares = {f"linear {row['layer']}": row["top1"] for row in rows}
            rows = formats.read_probe(str(folder / "knn.h5"))
            shares |= {f"kNN {row['setting']}": row["top1"] for row in rows}
            found[name] = {measure: f"{100 * share:.1f}" for measure, share in shares.items()}
            found[name]["minutes of both"] = minutes(folder)
    # Linear before kNN, also where a network has layers that the first has not.
    measures = sorted(dict.fromkeys(m for row in found.values() for m in row), key=_order)
    return markdown(
        ["top-1 on NETTE/val, %", *(TITLES[name] for name in found)],
        [[measure, *(row.get(measure, "") for row in found.values())] for measure in measures],
    )


def _order(measure: str) -> int:
    return ("linear", "kNN", "minutes").index(measure.split()[0])


def minutes(folder: Path) -> str:
    """What the commands of an experiment took."""
    record = json.loads((folder / "record.json").read_text())
    return f"{sum(command['seconds'] for command in record['commands']) / 60:.1f}"


def voc_rows(out: Path) -> str:
    """Mean average precision, in percent, of every task and network."""
    rows = []
    for task in ("classification", "detection"):
        for part in ("fc", "all"):
            for name, title in TITLES.items():
                folder = out / f"voc-{task}-{part}-{name}"
                if (folder / "record.json").exists():
                    mean = voc.mean_precision(formats.read_precisions(str(folder / "precision.h5")))
                    shares = (f"{100 * mean[measure]:.1f}" for measure in ("map11", "map"))
                    rows.append([f"{task}, {part}", title, *shares, minutes(folder)])
    return markdown(["task", "network", "mAP 11 points, %", "mAP area, %", "minutes"], rows)


def imbalance_rows(out: Path) -> str:
    """Means over the seeds, with the range of kNN."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for folder in sorted(out.glob("imbalance-*")):
        if (folder / "record.json").exists():
            for line in (folder / "table.txt").read_text().splitlines()[1:]:
                imbalance, method, _, knn, nmi = line.split()
                found.setdefault((imbalance, method), []).append((float(knn), float(nmi)))
    rows: list[list[Any]] = []
    for (imbalance, method), values in found.items():
        knn, nmi = ([100 * value[place] for value in values] for place in (0, 1))
        spread = f"{statistics.mean(knn):.1f} ({min(knn):.1f}..{max(knn):.1f})"
        rows.append([imbalance, method, spread, f"{statistics.mean(nmi):.1f}", str(len(values))])
    return markdown(["imbalance", "labels", "kNN, % (range)", "NMI, %", "seeds"], rows)


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    doing = commands.add_parser("run", help="run what is not done yet")
    doing.add_argument("--nette", type=Path, required=True)
    doing.add_argument("--voc", type=Path, required=True)
    doing.add_argument("--resnet", type=Path, required=True, help="a ResNet-18's checkpoint")
    doing.add_argument("--out", type=Path, required=True)
    writing = commands.add_parser("write", help="write the page of what is done")
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--output", type=Path, default=Path("docs/results-protocols.md"))
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
    else:
        arguments.output.write_text(page(arguments.out), encoding="utf-8")


if __name__ == "__main__":
    main()
