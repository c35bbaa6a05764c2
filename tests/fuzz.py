"""Feeds damaged files to every reader, each in a child process of bounded memory and time.

    python tests/fuzz.py --each 500 --output docs/reliability.md

prints how many inputs of each format were read, refused with a message of ours, or went
wrong: `escaped` (another exception), `crash` (a signal), `loop` (out of time) and
`memory` (out of memory). What went wrong is kept in --keep and the exit status is 1.
An input is a function of its format and its number, so that each can be made again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, NoReturn

import h5py
import numpy as np
import record
from PIL import Image
from safetensors.numpy import save_file

from sela_cli import envelope, formats
from sela_cli.envelope import Provenance
from sela_cli.errors import SelaError
from sela_cli.formats import Checkpoint, HeadLabels, Labels
from sela_cli.images.sources import open_source
from sela_cli.keys import dataset_id
from sela_cli.scores import open_scores
from sela_cli.shares import marginal

# Beyond what the process has at the start; the valid files are some kilobytes.
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 10
FINE = ("read", "refused")
FUZZED = """Valid files of every format that is read, damaged at random: flipped bits, extreme
numbers, cuts, doubled and lost blocks. Each is read in a child process that may take 1 GiB and
10 seconds. `read`: read without complaint; `refused`: one line of ours; `escaped`: another
exception; `crash`: a signal; `loop`: out of time; `memory`: out of memory."""


class Outcome(NamedTuple):
    """How reading an input ended, and what it said."""

    kind: str
    message: str


# ---- valid files ------------------------------------------------------------

_ROWS = 12
_KEYS = [f"class{row % 2}/{row}.png" for row in range(_ROWS)]
_PROVENANCE = Provenance("fuzz", {"seed": 0}, dataset_id=dataset_id(_KEYS))


def _matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(_ROWS, 3)).astype(np.float32)


def _pixels(side: int = 20) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


def _logits(path: Path) -> None:
    columns = {"logits/0": 3, "logits/1": 3}
    with formats.create_logits(
        str(path), _KEYS, np.arange(_ROWS), _PROVENANCE, columns=columns, dtype="float32"
    ) as datasets:
        for item in datasets.values():
            item[:] = _matrix()


def _factored(path: Path) -> None:
    heads = [(np.ones((3, 4), np.float32), np.zeros(3, np.float32))]
    with formats.create_logits(
        str(path),
        _KEYS,
        np.arange(_ROWS),
        _PROVENANCE,
        columns={"features": 4},
        dtype="float16",
        heads=heads,
    ) as datasets:
        datasets["features"][:] = 1


def _labels(path: Path) -> None:
    attributes = dict.fromkeys(formats.LABEL_ATTRIBUTES, 1.0) | {"assign": "balanced"}
    trace = {"residual": np.array([0.1, 0.01]), "seconds": np.array([1.0, 2.0])}
    head = HeadLabels(np.arange(_ROWS) % 3, np.zeros(3), attributes, trace)
    formats.write_labels(str(path), Labels(_KEYS, np.arange(_ROWS), [head, head]), _PROVENANCE)


def _checkpoint(path: Path) -> None:
    model = {f"trunk.{n}.weight": np.ones((3, 2), np.float32) for n in range(4)}
    state = Checkpoint(
        model=model,
        optimizer=model,
        arch="alexnet-small",
        image_size=16,
        heads=[3],
        step=2,
        epoch=1.0,
        recipe={"lr": 0.1},
        losses=np.ones(2, np.float32),
    )
    formats.write_checkpoint(str(path), state, _PROVENANCE)


def _probe(path: Path) -> None:
    row = dict.fromkeys(formats.PROBE_DTYPE.names or (), 1)
    text = {"layer": "conv1", "method": "knn", "head": "", "setting": "k=1", "split": "test"}
    formats.write_probe(str(path), [row | text], _PROVENANCE)


def _precisions(path: Path) -> None:
    row = dict.fromkeys(formats.PRECISION_DTYPE.names or (), 1) | {"class": "bird"}
    formats.write_precisions(str(path), "detection", [row], _PROVENANCE)


def _packed(path: Path) -> None:
    truth_N = np.arange(_ROWS) % 2
    with formats.create_images(
        *(str(path), _KEYS, np.arange(_ROWS), _PROVENANCE),
        side=16,
        truth_N=truth_N,
        classes=("class0", "class1"),
    ) as pixels:
        pixels[:] = _pixels(16).transpose(2, 0, 1)


def _foreign(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("deep/scores", data=_matrix(), chunks=(4, 3), compression="gzip")
        file["deep"].attrs["note"] = "a matrix"


def _hdf5_images(path: Path) -> None:
    with h5py.File(path, "w") as file:
        images = np.stack([_pixels()] * _ROWS)
        file.create_dataset("images", data=images, chunks=(4, 20, 20, 3), compression="gzip")
        file["labels"] = np.arange(_ROWS) % 2
        file["keys"] = _KEYS


def _text_list(path: Path) -> None:
    for key in _KEYS:
        (path.parent / key).parent.mkdir(exist_ok=True)
        _image(path.parent / key)
    path.write_text("".join(f"{key}\t{key[:6]}\n" for key in _KEYS))


def _image(path: Path) -> None:
    Image.fromarray(_pixels()).save(path)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for key in [*_KEYS[:3], "a" * 120 + ".png"]:
            data = BytesIO()
            Image.fromarray(_pixels(8)).save(data, "png")
            member = tarfile.TarInfo(key)
            member.size = data.tell()
            archive.addfile(member, BytesIO(data.getvalue()))


# ---- readers ----------------------------------------------------------------


def _read_scores(path: Path) -> None:
    with open_scores(str(path)) as scores:
        for head in scores.heads:
            head.read(slice(0, head.shape[0]))
            head.read(np.arange(0, head.shape[0], 5))


def _read_images(path: Path) -> None:
    source = open_source(str(path))
    for number in range(min(len(source), 100)):
        source.image(number)


def _read_image(path: Path) -> None:
    _read_images(path.parent)


def _our(read: Callable[[str], object]) -> Callable[[Path], None]:
    def call(path: Path) -> None:
        envelope.describe(str(path))
        read(str(path))

    return call


def _read_weights(path: Path) -> None:
    marginal(str(path), 3)


Maker = Callable[[Path], object]
# Name -> (file name, how a valid one is made, how it is read).
FORMATS: dict[str, tuple[str, Maker, Callable[[Path], None]]] = {
    "logits": ("logits.h5", _logits, _read_scores),
    "factored logits": ("logits.h5", _factored, _read_scores),
    "labels": ("labels.h5", _labels, _our(formats.read_labels)),
    "checkpoint": ("checkpoint.h5", _checkpoint, _our(formats.read_checkpoint)),
    "probe": ("probe.h5", _probe, _our(formats.read_probe)),
    "finetune": ("finetune.h5", _precisions, _our(formats.read_precisions)),
    "packed images": ("images.h5", _packed, _our(lambda path: _read_images(Path(path)))),
    "foreign HDF5": ("scores.h5", _foreign, _read_scores),
    "HDF5 of images": ("images.h5", _hdf5_images, _read_images),
    "npy": ("scores.npy", lambda path: np.save(path, _matrix()), _read_scores),
    "npz": ("scores.npz", lambda path: np.savez_compressed(path, scores=_matrix()), _read_scores),
    "safetensors": (
        "scores.safetensors",
        lambda path: save_file({"scores": _matrix()}, path),
        _read_scores,
    ),
    "text list": ("list.txt", _text_list, _read_images),
    "weights": ("weights.txt", lambda path: path.write_text("1 2.5\n3\n"), _read_weights),
    "tar": ("images.tar", _tar, _read_images),
    "tgz": ("images.tgz", _tar, _read_images),
    **{
        ending: (f"image.{ending}", _image, _read_image)
        for ending in ("jpg", "png", "bmp", "gif", "webp", "tif", "ppm")
    },
}


# ---- damage -----------------------------------------------------------------


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four kinds of damage: flipped bits, extreme numbers, cuts, doubled or lost blocks."""
    spoilt = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        size = len(spoilt)
        if size == 0:
            break
        # Half of the damage is near the start, where the headers are.
        place = int(rng.integers(0, min(size, 512) if rng.random() < 0.5 else size))
        length = int(rng.integers(1, 65))
        kind = rng.random()
        if kind < 0.35:
            spoilt[place] ^= 1 << int(rng.integers(0, 8))
        elif kind < 0.5:
            spoilt[place] = int(rng.integers(0, 256))
        elif kind < 0.75:
            width = (1, 2, 4, 8)[rng.integers(4)]
            top = 1 << (8 * width)
            number = (0, 1, top - 1, top // 2, top // 2 - 1, top // 256)[rng.integers(6)]
            spoilt[place : place + width] = number.to_bytes(width, "little")
        elif kind < 0.85:
            spoilt[place : place + length] = rng.bytes(length)
        elif kind < 0.9:
            spoilt[place:place] = spoilt[place : place + length]
        elif kind < 0.97:
            del spoilt[place : place + length]
        else:
            del spoilt[place:]
    return bytes(spoilt)


def damaged(name: str, valid: bytes, number: int) -> bytes:
    """Input `number` of a format, made from a valid file."""
    return mutate(valid, np.random.default_rng([*name.encode(), number]))


# ---- children ---------------------------------------------------------------


def outcomes(read: Callable[[Path], None], inputs: Iterable[bytes], path: Path) -> list[Outcome]:
    """How reading each input ends; `path` is where it is written for that."""
    waiting = list(inputs)
    ended: list[Outcome] = []
    while len(ended) < len(waiting):
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            _read_all(read, waiting[len(ended) :], path, sender)
        os.close(sender)
        with os.fdopen(receiver) as stream:
            ended += [Outcome(*json.loads(line)) for line in stream]
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            out_of_time = number in (signal.SIGPROF, signal.SIGALRM)
            name = signal.Signals(number).name
            ended.append(Outcome("loop" if out_of_time else "crash", name))
    return ended


def _read_all(
    read: Callable[[Path], None], inputs: list[bytes], path: Path, sender: int
) -> NoReturn:
    """The child: a line for each input, until one ends it."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        for data in inputs:
            path.write_bytes(data)
            # Processor time, and for one that waits instead, time.
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.alarm(20 * CPU_SECONDS)
            line = json.dumps(_outcome(read, path))
            os.write(sender, line.encode() + b"\n")
    finally:
        os._exit(0)


def _outcome(read: Callable[[Path], None], path: Path) -> Outcome:
    try:
        read(path)
    except SelaError as error:
        # What is shown is one line.
        told = str(error) and "\n" not in str(error)
        return Outcome("refused" if told else "escaped", str(error)[:2000])
    except MemoryError as error:
        return Outcome("memory", str(error)[:2000])
    except BaseException as error:
        return Outcome("escaped", f"{type(error).__name__}: {error}"[:2000])
    return Outcome("read", "")


def fuzz(name: str, numbers: range, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Outcomes of so many damaged inputs of a format, and a line for each that went wrong."""
    file_name, make, read = FORMATS[name]
    with tempfile.TemporaryDirectory(prefix="sela-fuzz-") as folder:
        path = Path(folder, file_name)
        make(path)
        inputs = [damaged(name, path.read_bytes(), number) for number in numbers]
        ended = outcomes(read, inputs, path)
    wrong = []
    for number, data, (kind, message) in zip(numbers, inputs, ended, strict=True):
        if kind not in FINE:
            wrong.append(f"{name} {number}: {kind}: {message[:200]}")
            if keep:
                (keep / f"{name.replace(' ', '-')}-{number}-{file_name}").write_bytes(data)
    return Counter(kind for kind, _ in ended), wrong


def main() -> int:
    """Fuzz every format; the table goes to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=500, help="inputs of each format")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--only", choices=FORMATS, action="append", help="these formats")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that went wrong")
    parser.add_argument("--output", type=Path, help="document that the table is recorded in")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    total: Counter[str] = Counter()
    began = time.monotonic()
    rows: list[list[object]] = []
    columns = [*FINE, "escaped", "crash", "loop", "memory"]
    print(f"{'format':<16}", *(f"{column:>8}" for column in columns), flush=True)
    for name in arguments.only or FORMATS:
        numbers = range(arguments.first, arguments.first + arguments.each)
        counts, wrong = fuzz(name, numbers, arguments.keep)
        print(f"{name:<16}", *(f"{counts[column]:>8}" for column in columns), flush=True)
        for line in wrong:
            print(json.dumps(line), file=sys.stderr, flush=True)
        total += counts
        rows.append([name, counts.total(), *(counts[column] for column in columns)])
        # After each format: what is measured is there, whatever becomes of the rest.
        if arguments.output:
            last = ["all", total.total(), *(total[column] for column in columns)]
            text = (
                f"{FUZZED} Input `n` of a format is the same every time. It took "
                f"{time.monotonic() - began:.0f} s.\n\n"
                + record.table(["format", "inputs", *columns], [*rows, last])
            )
            record.section(arguments.output, "Damaged files", text)
    print(f"{'all':<16}", *(f"{total[column]:>8}" for column in columns))
    return int(any(total[column] for column in columns if column not in FINE))


if __name__ == "__main__":
    sys.exit(main())
