"""Images per second of `sela embed` and `sela train` against a plain loop, in one run.

    python benchmarks/train.py                        # writes docs/benchmarks-train.md
    python benchmarks/train.py --seconds 1 --cases alexnet@32:128 --output -    # a short try
    python benchmarks/train.py --device cuda --images 20000 --workers 16 \
        --cases resnet18@32:256,alexnet@224:256       # writes docs/benchmarks-train-gpu.md

The plain loop is what one writes first: a DataLoader over JPEG files, torchvision's
transforms image by image, float32, contiguous tensors, the ordinary optimizer; the same
network, heads, batch size and augmentation. Its files lie decoded in no cache; ours are
opened as `--data FOLDER` opens them, and packed by `sela pack`. Last comes the network
alone, on one batch that is made already: what any loop could reach. On a GPU it is one CUDA
graph; its and our first steps, which make the graphs, end before the clock starts, and the
plain loop pins its batches and has what its workers have made in advance taken from it.
Rounds of all variants alternate, so that a busy machine is unfair to none; a ratio is the
median over the rounds of the ratio to the plain loop's measurement in the same round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from sela_cli.devices import LEAD, Graphed
from sela_cli.envelope import Provenance
from sela_cli.folding import folded
from sela_cli.images.augment import MEAN, STD
from sela_cli.images.batches import Images, open_images
from sela_cli.images.pack import pack_stage
from sela_cli.logits import forward
from sela_cli.machine import processor
from sela_cli.networks import Network, build
from sela_cli.precision import autocast, faster
from sela_cli.recipe import Recipe
from sela_cli.training import Objective, Trainer

HEADS = [128] * 10
# Architecture@side of its input:images a batch. At 32 pixels 128 as in the paper, for the
# slowest 64 too, of which the optimizer takes twice the share.
CASES = ("alexnet-small@32:128", "alexnet@32:128", "resnet18@32:128", "resnet18@32:64")
CASES += ("alexnet@224:32",)
# Side of the input -> sides of the stored JPEGs.
SIDES = {32: (32, 32), 224: (500, 375)}
AIM = {32: 3.0, 224: 1.5}
GPU_AIM = 5.0
# Images of a pass, those at hand over and over.
_PASS = 1 << 19
PLAIN = "plain loop"
ALONE = "network alone"

# Works for at least so many seconds; returns images per second.
Work = Callable[[float], float]


def write_photo(folder: Path, sides: tuple[int, int], index: int) -> None:
    """A JPEG with structure at every scale, as photographs have it."""
    rng = np.random.default_rng(index)
    image = np.zeros((sides[1], sides[0], 3))
    for grain in (4, 16, 64):
        coarse = rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8)
        image += np.asarray(Image.fromarray(coarse).resize(sides)) / 3
    Image.fromarray(image.astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=90)


class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The plain data set: a file is opened, decoded and transformed when it is asked for."""

    def __init__(self, folder: Path, transform: v2.Transform) -> None:
        self.paths = sorted(folder.glob("*.jpg"))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), index


def endless(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def transforms(size: int, training: bool) -> v2.Transform:
    """torchvision's, on one PIL image."""
    shape: list[v2.Transform] = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    if size <= 64:
        shape = [v2.Resize((size, size))]
    if training:
        colours = v2.ColorJitter(0.4, 0.4, 0.4, 0.4)
        crop = v2.RandomResizedCrop(size, (0.2, 1.0))
        shape = [crop, colours, v2.RandomGrayscale(0.2), v2.RandomHorizontalFlip()]
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*shape, v2.ToImage(), to_float, v2.Normalize(MEAN, STD)])


def repeated(step: Callable[[], object], images: int, lead: int = 0) -> Work:
    """Whole steps of `images` images until the time is over, after `lead` that do not count."""

    def work(seconds: float) -> float:
        for _ in range(lead):
            step()
        wait()
        began, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - began < seconds:
            step()
            done += images
        wait()
        return done / (time.perf_counter() - began)

    return work


def wait() -> None:
    """For what a GPU is at."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain(
    network: Network, folder: Path, batch_size: int, workers: int, device: str
) -> dict[str, Work]:
    """The plain loop's embedding and training."""
    network = network.to(device)

    def batches(training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        data = Files(folder, transforms(network.image_size, training))
        return endless(
            DataLoader(
                data,
                batch_size,
                shuffle=training,
                drop_last=True,
                num_workers=workers,
                pin_memory=device != "cpu",
                persistent_workers=workers > 0,
            )
        )

    seen, learned = batches(False), batches(True)
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()

    def embed() -> None:
        network.eval()
        with torch.no_grad():
            network(next(seen)[0].to(device, non_blocking=True))

    def train() -> None:
        network.train()
        view, rows = (tensor.to(device, non_blocking=True) for tensor in next(learned))
        losses = [criterion(logits, rows % logits.shape[1]) for logits in network(view)]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    # Each worker has two batches ready.
    lead = 2 * workers
    return {
        "embed": repeated(embed, batch_size, lead),
        "train": repeated(train, batch_size, lead),
    }


class TimeIsOver(Exception):
    """Ends a training between two steps."""


def ours(
    network: Network, images: Images, batch_size: int, precision: str, device: str
) -> dict[str, Work]:
    """`sela embed` and `sela train`."""
    recipe = Recipe(batch_size=batch_size, lr=0.03, aug="paper", precision=precision)
    trainer = Trainer(network, recipe, device)
    labels_TN = [torch.arange(len(images)) % clusters for clusters in HEADS]

    whole = np.arange(len(images) // batch_size * batch_size)
    # One long pass: those of a GPU begin with a graph, which is no part of a large collection's.
    many = images.subset(np.tile(whole, -(-_PASS // len(whole))))
    lead = LEAD if device != "cpu" else 0

    def passes() -> Iterator[object]:
        while True:
            yield from forward(network, many, batch_size, device, precision, features=False)

    embedded = passes()

    def train(seconds: float) -> float:
        first, began = trainer.step + lead, time.perf_counter()

        def after() -> None:
            nonlocal began
            if trainer.step == first:
                wait()
                began = time.perf_counter()
            if trainer.step > first and time.perf_counter() - began >= seconds:
                raise TimeIsOver

        with suppress(TimeIsOver):
            trainer.run(images, labels_TN, sys.maxsize, after)
        wait()
        return (trainer.step - first) * batch_size / (time.perf_counter() - began)

    return {"embed": repeated(lambda: next(embedded), batch_size, lead), "train": train}


def alone(network: Network, batch_size: int, precision: str, device: str) -> dict[str, Work]:
    """Forward, and forward and backward, of one batch: no images, no optimizer."""
    network = network.to(device).to(memory_format=torch.channels_last)
    size = network.image_size
    view = torch.randn(batch_size, 3, size, size, device=device)
    view = view.contiguous(memory_format=torch.channels_last)
    objective = Objective(network, device, precision)
    labels_Tn = torch.stack([torch.arange(batch_size) % clusters for clusters in HEADS]).to(device)

    trunk = folded(network.trunk, precision)

    def embed() -> Tensor:
        with torch.no_grad():
            with autocast(device, precision):
                features_nD = trunk(view)
            return network.logits(features_nD.float())

    def train() -> Tensor:
        network.train()
        network.zero_grad()
        loss: Tensor = objective(view, labels_Tn)
        loss.backward()
        return loss.detach()

    steps: dict[str, Callable[[], Tensor]] = {"embed": embed, "train": train}
    if device != "cpu":
        steps = {name: Graphed(step) for name, step in steps.items()}
    return {name: repeated(step, batch_size, LEAD) for name, step in steps.items()}


def parsed(case: str) -> tuple[str, int, int]:
    """Architecture, side, images a batch."""
    arch, side, batch_size = case.replace(":", "@").split("@")
    return arch, int(side), int(batch_size)


def measure(case: str, options: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one network and size of input."""
    arch, size, batch_size = parsed(case)
    number, workers, device = options.images, options.workers, options.device

    def network() -> Network:
        return build(arch, size, HEADS, 0)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photos")
        folder.mkdir()
        with ProcessPoolExecutor() as pool:
            write = partial(write_photo, folder, SIDES[size])
            deque(pool.map(write, range(number), chunksize=32), 0)
        opened, _ = open_images(str(folder), size, hold=False)
        pack_stage(opened, f"{name}/packed.h5", Provenance("pack", {}))
        packed, _ = open_images(f"{name}/packed.h5", size)
        precision = faster(network(), batch_size, device, training=True)
        sela = partial(ours, batch_size=batch_size, device=device)
        auto = f"sela, packed, auto ({precision})"
        variants = {
            PLAIN: plain(network(), folder, batch_size, workers, device),
            "sela, folder, float32": sela(network(), opened, precision="float32"),
            "sela, packed, float32": sela(network(), packed, precision="float32"),
            auto: sela(network(), packed, precision=precision),
            f"{ALONE}, {precision}": alone(network(), batch_size, precision, device),
        }
        rows = []
        for stage in ("embed", "train"):
            speeds: dict[str, list[float]] = {title: [] for title in variants}
            for works in variants.values():
                works[stage](0)
            for _ in range(options.rounds):
                for title, works in variants.items():
                    speeds[title].append(works[stage](options.seconds))
            for title, values in speeds.items():
                pairs = zip(values, speeds[PLAIN], strict=True)
                times = statistics.median(value / base for value, base in pairs)
                spread = f"{min(values):.0f}..{max(values):.0f}"
                median = f"{statistics.median(values):.0f}"
                rows.append([case, stage, title, median, spread, f"{times:.2f}"])
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
        return rows


def verdicts(rows: list[list[str]], device: str) -> list[str]:
    """Of every case and stage, the fastest of ours beside the aim, and beside the network alone."""
    lines = []
    for case, stage in dict.fromkeys((row[0], row[1]) for row in rows):
        here = [row for row in rows if row[:2] == [case, stage]]
        best = max(
            (row for row in here if row[2].startswith("sela")), key=lambda row: float(row[5])
        )
        limit = next(row for row in here if row[2].startswith(ALONE))
        aim = AIM[parsed(case)[1]] if device == "cpu" else GPU_AIM
        word = "reached" if float(best[5]) >= aim else "missed"
        share = float(best[5]) / float(limit[5])
        lines.append(
            f"- {case}, {stage}: {best[5]} times the plain loop, aim {aim:g} {word}; "
            f"{share:.0%} of the network alone, which is {limit[5]} times the plain loop"
        )
    return lines


def page(rows: list[list[str]], threads: int, workers: int, device: str) -> str:
    """The table with all that is needed to judge and repeat it."""
    machine = processor() if device == "cpu" else f"{torch.cuda.get_device_name()}, {processor()}"
    words = [*sys.argv]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return "\n".join(
        [
            "# Speed of embedding and training",
            "",
            "By `benchmarks/train.py`. Images a second, medians; `times` is against the plain",
            "loop in the same round: a DataLoader over JPEG files, torchvision's transforms on one",
            "PIL image each, float32, contiguous. The same network with ten heads of 128, and the",
            "paper's augmentation. *folder*: decoded again whenever it is seen, as one too large",
            "for memory is. *network alone*: forward (and backward) of one batch made before,",
            "without images or optimizer: no loop is faster.",
            "",
            "| network | stage | variant | images/s | range | times |",
            "|---|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *verdicts(rows, device),
            "",
            f"- command: `python {' '.join(words)}`",
            f"- machine: {machine}, {threads} threads, {workers} workers of the plain loop",
            f"- versions: Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}",
            f"- date: {datetime.now(UTC):%Y-%m-%d}",
            "",
        ]
    )


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="architecture@side:batch, ...")
    parser.add_argument("--images", type=int, default=1024, help="files of each case")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--workers", type=int, default=0, help="of the plain loop's DataLoader")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", help="page, or -; default: that of the device in docs/")
    options = parser.parse_args()
    # For the plain loop: ours searches by itself.
    torch.backends.cudnn.benchmark = True
    rows: list[list[str]] = []
    for case in options.cases.split(","):
        rows += measure(case, options)
    text = page(rows, torch.get_num_threads(), options.workers, options.device)
    suffix = "" if options.device == "cpu" else "-gpu"
    output = options.output or f"docs/benchmarks-train{suffix}.md"
    if output == "-":
        print(text)
    else:
        Path(output).write_text(text)


if __name__ == "__main__":
    main()
