"""Images per second of `sela embed` and `sela train` against a plain loop, in one run.

    python benchmarks/train.py                        # writes docs/benchmarks-train.md
    python benchmarks/train.py --seconds 1 --sizes 32 --output -      # a short try

The plain loop is what one writes first: a DataLoader over JPEG files, torchvision's
transforms image by image, float32, contiguous tensors, the ordinary optimizer; the same
network, heads, batch size and augmentation. Its files lie decoded in no cache; ours are
opened as `--data FOLDER` opens them, and packed by `sela pack`. Rounds of all variants
alternate, so that a busy machine is unfair to none; medians are reported.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from sela_cli.formats import Provenance
from sela_cli.images.augment import MEAN, STD
from sela_cli.images.batches import Images, open_images
from sela_cli.images.pack import pack_stage
from sela_cli.logits import forward
from sela_cli.networks import Network, build
from sela_cli.precision import faster
from sela_cli.training import Recipe, Trainer

HEADS = [128] * 10
# Side of the network's input -> architecture, sides of the stored JPEGs, batch size.
CASES = {32: ("alexnet", (32, 32), 128), 224: ("alexnet", (500, 375), 64)}
AIM = {32: 3.0, 224: 1.5}

# Does one batch.
Step = Callable[[], object]


def write_photos(folder: Path, number: int, sides: tuple[int, int]) -> None:
    """JPEGs with structure at every scale, as photographs have it."""
    rng = np.random.default_rng(0)
    for index in range(number):
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


def plain_steps(network: Network, folder: Path, batch_size: int, workers: int) -> dict[str, Step]:
    """The plain loop's embedding and training of one batch."""

    def batches(training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        data = Files(folder, transforms(network.image_size, training))
        return endless(
            DataLoader(
                data,
                batch_size,
                shuffle=training,
                drop_last=True,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
        )

    seen, learned = batches(False), batches(True)
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()

    def embed() -> None:
        network.eval()
        with torch.no_grad():
            network(next(seen)[0])

    def train() -> None:
        network.train()
        view, rows = next(learned)
        losses = [criterion(logits, rows % logits.shape[1]) for logits in network(view)]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return {"embed": embed, "train": train}


def our_steps(network: Network, images: Images, batch_size: int, precision: str) -> dict[str, Step]:
    """`sela embed` and `sela train`, a batch at a time."""
    recipe = Recipe(batch_size=batch_size, lr=0.03, aug="paper", precision=precision)
    trainer = Trainer(network, recipe)
    labels_TN = [torch.arange(len(images)) % clusters for clusters in HEADS]

    def passes() -> Iterator[object]:
        while True:
            whole = len(images) // batch_size
            yield from islice(
                forward(network, network, images, batch_size, precision=precision), whole
            )

    embedded = passes()

    def train() -> None:
        # As many batches as a call of the loop has between two rounds, at least.
        trainer.run(images, labels_TN, trainer.step + 4, lambda: None)

    return {"embed": lambda: next(embedded), "train": train}


def rate(step: Step, images: int, seconds: float) -> float:
    """Images a second over at least `seconds`, after the first step."""
    began = time.perf_counter()
    for done in count(1):
        step()
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return done * images / elapsed
    raise AssertionError


def measure(size: int, number: int, seconds: float, rounds: int, workers: int) -> list[str]:
    """Rows of the table for one size of input."""
    arch, sides, batch_size = CASES[size]
    batch_size = min(batch_size, number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photos")
        folder.mkdir()
        write_photos(folder, number, sides)
        opened, _ = open_images(str(folder), size, hold=False)
        pack_stage(opened, f"{name}/packed.h5", Provenance("pack", {}))
        packed, _ = open_images(f"{name}/packed.h5", size)
        precision = faster(build(arch, size, HEADS, 0), batch_size, "cpu", training=True)
        variants: dict[str, dict[str, Step]] = {
            "plain loop": plain_steps(build(arch, size, HEADS, 0), folder, batch_size, workers)
        }
        for title, images, kind in (
            ("sela, folder, float32", opened, "float32"),
            ("sela, packed, float32", packed, "float32"),
            (f"sela, packed, auto ({precision})", packed, precision),
        ):
            variants[title] = our_steps(build(arch, size, HEADS, 0), images, batch_size, kind)
        rows = []
        for stage in ("embed", "train"):
            speeds: dict[str, list[float]] = {title: [] for title in variants}
            for steps in variants.values():
                steps[stage]()
            for _ in range(rounds):
                for title, steps in variants.items():
                    images_a_step = batch_size * (4 if stage == "train" and "sela" in title else 1)
                    speeds[title].append(rate(steps[stage], images_a_step, seconds))
            base = statistics.median(speeds["plain loop"])
            for title, values in speeds.items():
                median = statistics.median(values)
                rows.append(
                    f"| {size} | {stage} | {title} | {median:.0f} | "
                    f"{min(values):.0f}..{max(values):.0f} | {median / base:.2f} |"
                )
        return rows


def page(rows: list[str], threads: int, workers: int) -> str:
    """The table with all that is needed to judge and repeat it."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0].split(":")[1].strip() if names else processor
    aims = ", ".join(f"{aim:g}x at {size} pixels" for size, aim in AIM.items())
    return "\n".join(
        [
            "# Speed of embedding and training",
            "",
            "Written by `make bench-train`. Images a second, medians; `times` is against the plain",
            "loop of the same run: a DataLoader over JPEG files, torchvision's transforms on one",
            "PIL image each, float32, contiguous. The network is the same, AlexNet with ten heads,",
            f"the paper's augmentation. The aim on a CPU: {aims}.",
            "",
            "| pixels | stage | variant | images/s | range | times |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"- command: `python {' '.join(sys.argv)}`",
            f"- machine: {processor}, {threads} threads, {workers} workers of the plain loop",
            f"- versions: Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}",
            f"- date: {datetime.now(UTC):%Y-%m-%d}",
            "",
        ]
    )


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="32,224", help="sides of the network's input")
    parser.add_argument("--images", type=int, default=1024, help="files of each size")
    parser.add_argument("--seconds", type=float, default=10.0, help="least time of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant")
    parser.add_argument("--workers", type=int, default=0, help="of the plain loop's DataLoader")
    parser.add_argument("--output", default="docs/benchmarks-train.md", help="page, or -")
    options = parser.parse_args()
    rows: list[str] = []
    for size in map(int, options.sizes.split(",")):
        rows += measure(size, options.images, options.seconds, options.rounds, options.workers)
    text = page(rows, torch.get_num_threads(), options.workers)
    if options.output == "-":
        print(text)
    else:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
