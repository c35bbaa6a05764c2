"""The command line: exit codes, one line of what is wrong, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.numpy import save_file

from sela_cli import __version__, cli, envelope, errors, formats, interrupt, options
from sela_cli.envelope import Provenance
from sela_cli.formats import Checkpoint
from sela_cli.images.batches import Images
from sela_cli.keys import dataset_id

COMMANDS = list(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
TINY = "--arch alexnet-small --image-size 16 --device cpu --batch-size 4"
PHOTOS = 4


@dataclass
class Done:
    """How a call of `sela` ended."""

    code: int
    out: bytes
    err: str


def sela(*arguments: str, stdin: bytes = b"") -> Done:
    """`sela ARGUMENTS` in this process, through `main`: a start of its own takes seconds."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe")
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    try:
        with (
            mock.patch.object(sys, "argv", ["sela", *arguments]),
            mock.patch.object(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(stdin))),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = ended.value.code
    assert isinstance(code, int)
    return Done(code, out.buffer.getvalue(), err.buffer.getvalue().decode())  # type: ignore[attr-defined]


def good(*arguments: str, stdin: bytes = b"") -> Done:
    done = sela(*arguments, stdin=stdin)
    assert done.code == 0, done.err
    return done


def words(text: str) -> list[str]:
    return text.split()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of good and bad inputs; the working folder of every test here."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        for number in range(PHOTOS):
            photo(Path(f"photos/class{number % 2}/{number}.png"), number)
            photo(Path(f"spoilt/{number}.png"), number)
            photo(Path(f"stray/class{number % 2}/{number}.png"), number)
        photo(Path("stray/loose.png"), 0)
        Path("spoilt/broken.png").write_bytes(b"\x89PNG no more")
        Path("empty").mkdir()
        Path("notes.md").write_text("no images here")
        matrix = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
        np.save("scores.npy", matrix)
        np.savez("scores.npz", scores=matrix)
        save_file({"scores": matrix}, "scores.safetensors")
        with h5py.File("scores.h5", "w") as file:
            file["deep/scores"] = matrix
        write_logits("logits.h5", matrix, matrix[:, ::-1])
        Path("cut.h5").write_bytes(Path("logits.h5").read_bytes()[:-100])
        for name, value in (("nan", np.nan), ("inf", np.inf)):
            spoilt = matrix.copy()
            spoilt[7, 1] = value
            write_logits(f"{name}.h5", matrix, spoilt)
            np.save(f"{name}.npy", spoilt)
        np.save("vector.npy", matrix[:, 0])
        np.save("wide.npy", matrix.T)
        np.save("truth.npy", np.arange(12) % 3)
        Path("weights.txt").write_text("1 2")
        Path("thirds.txt").write_text("1 1 1")
        with h5py.File("foreign.h5", "w") as file:
            file["vector"] = np.arange(5.0)
        np.savez("two.npz", a=matrix, b=matrix)
        for ending in ("csv", "tsv", "parquet"):
            Path(f"foreign.{ending}").write_text("1,2")
        torch.save(torch.from_numpy(matrix), "foreign.pt")
        torch.save(torch.nn.Linear(2, 2), "module.pth")
        Path("empty.npy").touch()
        Path("bad.tar").write_bytes(b"no tar")
        Path("taken").write_text("precious")
        Path("run").mkdir()
        Path("run/labels.h5").write_text("precious")
        good(*words("label logits.h5 -o labels.h5 -q"))
        names = [path.relative_to("photos").as_posix() for path in Path("photos").rglob("*.png")]
        write_logits("photos.h5", np.eye(PHOTOS)[:, :2], keys=sorted(names))
        good(*words("label photos.h5 -o photo-labels.h5 --assign random -q"))
        formats.write_checkpoint("tiny.h5", empty_checkpoint(), Provenance("test", {}))
        yield folder


@pytest.fixture(autouse=True)
def _in_the_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a failing test leaves must not fail the next one."""
    monkeypatch.chdir(world)
    before = snapshot(world)
    yield
    for path in snapshot(world).keys() - before.keys():
        Path(path).unlink()


def write_logits(path: str, *heads_NK: np.ndarray, keys: list[str] | None = None) -> None:
    keys = keys or [f"image/{row}" for row in range(len(heads_NK[0]))]
    with formats.create_logits(
        path,
        keys,
        np.arange(len(keys)),
        Provenance("test", {}, dataset_id=dataset_id(keys)),
        columns={f"logits/{number}": head.shape[1] for number, head in enumerate(heads_NK)},
        dtype="float32",
    ) as datasets:
        for number, head_NK in enumerate(heads_NK):
            datasets[f"logits/{number}"][:] = head_NK


def empty_checkpoint() -> Checkpoint:
    """A checkpoint that holds no network: readable, and too small for its arch."""
    return Checkpoint({}, {}, "alexnet-small", 16, [3], 0, 0.0, {})


# ---- what is wrong, in one line ---------------------------------------------

TRAIN = "train --data photos --arch alexnet-small --image-size 16 -o new.h5"
GO_ON = "train --data photos -l photo-labels.h5 -c tiny.h5 -o new.h5"
RETRAIN = "retrain --data photos --arch alexnet-small -o new.h5"
EMBED = "embed --arch alexnet-small --heads 2 --image-size 16 -o new.h5"
PROBE = "probe --data photos --checkpoint tiny.h5 -o new.h5"
RUN = "run --data photos --out new --arch alexnet-small --heads 2 --epochs 1 --opts 1"

# (command line, exit code, what the line must name)
REFUSED: list[tuple[str, int, list[str]]] = [
    # 65: there, and can't be used
    ("label cut.h5 -o new.h5", 65, ["cut.h5", "truncated"]),
    ("info cut.h5", 65, ["cut.h5", "truncated"]),
    ("metrics cut.h5 --truth truth.npy", 65, ["cut.h5", "truncated"]),
    ("label foreign.h5 -o new.h5", 65, ["foreign.h5"]),
    ("label foreign.h5::/vector -o new.h5", 65, ["foreign.h5", "vector", "(5,)"]),
    ("label foreign.h5::/absent -o new.h5", 65, ["foreign.h5", "absent"]),
    ("info foreign.h5", 65, ["foreign.h5", "not a sela file"]),
    ("info notes.md", 65, ["notes.md"]),
    ("label nan.h5 -o new.h5", 65, ["nan.h5", "logits/1", "row 7"]),
    ("label inf.h5 -o new.h5", 65, ["inf.h5", "logits/1", "row 7"]),
    ("label nan.npy -o new.h5 --csv new.csv", 65, ["nan.npy", "row 7"]),
    ("label inf.npy -o new.h5 --assign argmax", 65, ["inf.npy", "row 7"]),
    ("label scores.npy --input-kind probabilities -o new.h5", 65, ["scores.npy", "row"]),
    ("label vector.npy -o new.h5", 65, ["vector.npy", "(12,)"]),
    ("label wide.npy -o new.h5", 65, ["wide.npy", "12 clusters", "3 images"]),
    ("label wide.npy -o new.h5 --assign random", 65, ["wide.npy", "12 clusters"]),
    (f"{TRAIN} -l photo-labels.h5 --lr-milestones 30,60", 2, ["--lr-milestones are fractions"]),
    ("label labels.h5 -o new.h5", 65, ["labels.h5", "logits are needed"]),
    *[
        (f"label foreign.{ending} -o new.h5", 65, [f"numpy.save('scores.npy', {array})"])
        for ending, array in (
            ("csv", "numpy.loadtxt('foreign.csv', delimiter=',')"),
            ("tsv", "numpy.loadtxt('foreign.tsv')"),
            ("parquet", "pandas.read_parquet('foreign.parquet').to_numpy()"),
            ("pt", "torch.load('foreign.pt').numpy()"),
        )
    ],
    ("label two.npz -o new.h5", 65, ["name one: two.npz::a"]),
    ("label photos -o new.h5", 65, ["photos", "folder"]),
    ("label logits.h5 -o new.h5 --marginal weights.txt", 65, ["weights.txt", "2 weights"]),
    ("label logits.h5 -o new.h5 --marginal notes.md", 65, ["notes.md"]),
    ("info scores.npy", 65, ["scores.npy is a NumPy array", "sela label"]),
    ("label scores.npy -o new.h5 --init scores.npy", 65, ["scores.npy is a NumPy array"]),
    ("label logits.h5 -o new.h5 --marginal nan.npy", 65, ["nan.npy"]),
    ("label logits.h5 -o new.h5 --marginal empty.npy", 65, ["empty.npy"]),
    ("metrics labels.h5 --truth empty.npy", 65, ["empty.npy"]),
    ("label scores.npy -o new.h5 --init labels.h5", 65, ["2 heads"]),
    ("label logits.h5 -o new.h5 --init logits.h5", 65, ["logits.h5", "labels is needed"]),
    (f"{EMBED} --data empty", 65, ["empty"]),
    (f"{EMBED} --data spoilt", 65, ["broken.png", "--skip-bad"]),
    (f"{EMBED} --data bad.tar", 65, ["bad.tar"]),
    (f"{EMBED} --data notes.md", 65, ["notes.md"]),
    (f"{EMBED} --data foreign.h5", 65, ["foreign.h5"]),
    ("embed --data photos -c tiny.h5 -o new.h5", 65, ["tiny.h5", "alexnet-small"]),
    ("embed --data photos -c logits.h5 -o new.h5", 65, ["logits.h5", "checkpoint is needed"]),
    (f"{TRAIN} -l labels.h5", 65, ["labels.h5", "photos", "12 images"]),
    (f"{TRAIN} -l logits.h5", 65, ["logits.h5", "labels is needed"]),
    (f"{RETRAIN} -l labels.h5", 65, ["labels.h5", "photos"]),
    (PROBE, 65, ["tiny.h5"]),
    ("metrics photo-labels.h5 --truth stray", 65, ["'loose.png' lies in no", "move or remove"]),
    ("metrics photo-labels.h5 --truth spoilt", 65, ["one subfolder a class", ".npy"]),
    ("metrics labels.h5 --truth photos", 65, ["photos", "labels.h5"]),
    ("metrics labels.h5 --truth scores.npy", 65, ["scores.npy", "labels.h5"]),
    ("metrics labels.h5 --truth scores.npz", 65, ["scores.npz"]),
    ("metrics labels.h5 --truth logits.h5", 65, ["logits.h5"]),
    ("run --data empty --out new", 65, ["empty"]),
    ("run --data photos -c labels.h5 --out new", 65, ["labels.h5", "checkpoint is needed"]),
    ("import tiny.h5 --arch alexnet-small --heads 2 -o new.h5", 65, ["tiny.h5", "sela export"]),
    ("import module.pth --arch alexnet-small --heads 2 -o new.h5", 65, ["of tensors alone; where"]),
    ("import scores.npy --arch alexnet-small --heads 2 -o new.h5", 65, ["of tensors alone; where"]),
    # 66: not there
    ("label absent.h5 -o new.h5", 66, ["absent.h5"]),
    ("label scores.npy -o new.h5 --init absent.h5", 66, ["absent.h5"]),
    ("label scores.npy -o new.h5 --marginal absent.txt", 66, ["absent.txt"]),
    (f"{EMBED} --data absent", 66, ["absent", "digits"]),
    (f"{EMBED} --data what:ever", 66, ["what:ever"]),
    (f"{EMBED} --data cifar10:empty", 66, ["cifar10:empty", "--download"]),
    ("embed --data photos -c absent.h5 -o new.h5", 66, ["absent.h5"]),
    (f"{TRAIN} -l absent.h5", 66, ["absent.h5"]),
    ("train --data photos -l labels.h5 -c absent.h5 -o new.h5", 66, ["absent.h5"]),
    ("train --data absent -l labels.h5 --arch resnet18 -o new.h5", 66, ["absent"]),
    (f"{RETRAIN} -l absent.h5", 66, ["absent.h5"]),
    ("probe --data photos -c absent.h5 -o new.h5", 66, ["absent.h5"]),
    ("metrics absent.h5 --truth photos", 66, ["absent.h5"]),
    ("metrics labels.h5 --truth absent.npy", 66, ["absent.npy"]),
    ("metrics labels.h5 --truth absent.h5", 66, ["absent.h5"]),
    ("metrics labels.h5 --truth absent", 66, ["absent"]),
    ("info absent.h5", 66, ["absent.h5"]),
    ("run --data absent --out new", 66, ["absent"]),
    ("run --data photos -c absent.h5 --out new", 66, ["absent.h5"]),
    # 73: can't be written
    ("label logits.h5 -o taken", 73, ["taken", "--force"]),
    ("label logits.h5 -o new.h5 --csv taken", 73, ["taken", "--force"]),
    (f"{EMBED} --data photos -o taken", 73, ["taken", "--force"]),
    (f"{TRAIN} -l labels.h5 -o taken", 73, ["taken", "--force"]),
    (f"{RETRAIN} -l labels.h5 -o taken", 73, ["taken", "--force"]),
    (f"{PROBE} -o taken", 73, ["taken", "--force"]),
    (f"{RUN} --out run", 73, ["run holds labels.h5 and no run"]),
    (f"{RUN} --out run --force", 73, ["run holds labels.h5 and no run"]),
    (f"{RUN} --out taken", 73, ["taken"]),
    ("label logits.h5 -o nowhere/new.h5", 73, ["nowhere/new.h5", "no such folder"]),
    ("label logits.h5 -o new.h5 --csv nowhere/new.csv", 73, ["nowhere/new.csv"]),
    (f"{EMBED} --data photos -o nowhere/new.h5", 73, ["nowhere/new.h5"]),
    (f"{TRAIN} -l labels.h5 -o nowhere/new.h5", 73, ["nowhere/new.h5"]),
    (f"{RETRAIN} -l labels.h5 -o nowhere/new.h5", 73, ["nowhere/new.h5"]),
    (f"{PROBE} -o nowhere/new.h5", 73, ["nowhere/new.h5"]),
    ("label logits.h5 -o photos --force", 73, ["photos", "folder"]),
    # 2: no such option, or no such combination
    ("embed --data photos --arch resnet18 -o new.h5", 2, ["--heads"]),
    ("embed --data photos -o new.h5", 2, ["--checkpoint", "--arch"]),
    ("embed --data photos --arch resnet18 -c tiny.h5 -o new.h5", 2, ["--checkpoint"]),
    ("run --data photos -c tiny.h5 --arch resnet18 --out new", 2, ["the checkpoint's"]),
    (f"{GO_ON} --head-init kmeans", 2, ["--head-init"]),
    (f"{GO_ON} --image-size 16", 2, ["--image-size"]),
    ("embed --data photos --arch vgg --heads 2 -o new.h5", 2, ["vgg", "resnet18"]),
    *[
        (f"embed --data photos --arch alexnet-small --heads {heads} -o new.h5", 2, [heads])
        for heads in ("many", "0", "5x0", "5x-1", "-5", "5x", "5,,5", "2x3x4", "1.5")
    ],
    ("label logits.h5 -o new.h5 --marginal zipf:steep", 2, ["zipf:steep"]),
    ("label logits.h5 -o new.h5 --marginal gaussian:", 2, ["gaussian:"]),
    ("label logits.h5 -o new.h5 --method kmeans --clusters 0", 2, ["--clusters 0: write"]),
    ("label logits.h5 -o new.h5 --lamb 0", 2, ["--lamb"]),
    ("label logits.h5 -o new.h5 --lamb nan", 2, ["--lamb"]),
    ("label logits.h5 -o new.h5 --lamb inf", 2, ["--lamb"]),
    ("label logits.h5 -o new.h5 --tol -1", 2, ["--tol"]),
    (f"{TRAIN} -l labels.h5 -c tiny.h5", 2, ["--checkpoint", "--arch"]),
    ("train --data photos -l labels.h5 -o new.h5", 2, ["--checkpoint", "--arch"]),
    (f"{TRAIN} -l labels.h5 --aug blur", 2, ["--aug", "blur"]),
    (f"{TRAIN} -l labels.h5 --lr-schedule up", 2, ["--lr-schedule"]),
    *[
        (f"{line} --lr-schedule cosine {options}", 2, [named, "--lr-schedule cosine"])
        for line in (f"{TRAIN} -l labels.h5", RUN)
        for options, named in (
            ("--lr-milestones 0.5", "--lr-milestones is not for"),
            ("--lr-factor 0.5", "--lr-factor is not for"),
        )
    ],
    (f"{TRAIN} -l labels.h5 --lr -1", 2, ["--lr"]),
    *[
        (f"{TRAIN} -l photo-labels.h5 --{option} {value}", 2, [f"--{option}"])
        for option, value in (
            ("lr", "nan"),
            ("lr", "inf"),
            ("epochs", "nan"),
            ("epochs", "inf"),
            ("to", "nan"),
            ("to", "inf"),
            ("momentum", "-3"),
            ("weight-decay", "-1"),
        )
    ],
    ("embed --data photos -c tiny.h5 --heads 7 -o new.h5", 2, ["--heads"]),
    ("label logits.h5 -o new.h5 --csv new.h5", 2, ["--csv"]),
    ("label logits.h5 -o - --csv -", 2, ["--csv"]),
    *[
        (f"{line} --force", 2, ["would take the place of what is read", named])
        for line, named in (
            ("label logits.h5 -o logits.h5", "logits.h5"),
            ("label scores.h5::/deep/scores -o ./scores.h5", "scores.h5"),
            ("label logits.h5 -o new.h5 --csv logits.h5", "logits.h5"),
            ("label logits.h5 -o logits.h5 --head 0 --init labels.h5", "logits.h5"),
            ("label logits.h5 -o new.h5 --init labels.h5 --csv labels.h5", "labels.h5"),
            ("label scores.npy -o thirds.txt --marginal thirds.txt", "thirds.txt"),
            ("label scores.npy -o new.h5 --marginal thirds.txt --csv thirds.txt", "thirds.txt"),
            (
                "label scores.npy -o thirds.txt --marginal thirds.txt --head 0 --init labels.h5",
                "thirds.txt",
            ),
            ("report run -o run/labels.h5", "labels.h5"),
            (f"{EMBED} --data foreign.h5::/vector -o foreign.h5", "foreign.h5"),
            ("embed --data photos -c tiny.h5 -o tiny.h5", "tiny.h5"),
            (f"{TRAIN} -l photo-labels.h5 -o photo-labels.h5", "photo-labels.h5"),
            (f"{RETRAIN} -l photo-labels.h5 -o photo-labels.h5", "photo-labels.h5"),
            (f"{PROBE} -o tiny.h5", "tiny.h5"),
            ("finetune --task classification --data voc2007:x -c tiny.h5 -o tiny.h5", "tiny.h5"),
            ("pack bad.tar -o bad.tar", "bad.tar"),
            ("export-logits logits.h5 -o logits.h5", "logits.h5"),
            ("export-labels labels.h5 -o labels.h5", "labels.h5"),
            ("export tiny.h5 -o tiny.h5", "tiny.h5"),
            (
                "import scores.safetensors --arch alexnet-small --heads 2 -o scores.safetensors",
                "scores.safetensors",
            ),
            ("info labels.h5 --plot labels.h5", "labels.h5"),
        )
    ],
    *[
        (f"{PROBE} {options}", 2, [named])
        for options, named in (
            ("--method knn --batch-size 8", "--batch-size is not for --method knn"),
            ("--method knn --layers conv3", "--layers is not for --method knn"),
            ("--protocol knn --lr-milestones 0.5", "--lr-milestones is not for --method knn"),
            ("--method linear --pca 8", "--pca is not for --method linear"),
            ("--protocol small-linear --k 5", "--k is not for --method linear"),
            ("--validation 0.2", "--validation chooses among several rates"),
            ("--lr 0.1 --validation 0.2", "--validation chooses among several rates"),
            ("--test photos --holdout 0.3", "--holdout is for images without --test"),
        )
    ],
    (
        "finetune --task classification --data voc2007:x -c tiny.h5 -o new.h5 --min-size 64",
        2,
        ["--min-size is for --task detection"],
    ),
    ("export-logits logits.h5 -o new.npy --features --head 0", 2, ["leave --head out"]),
    ("schedule --epochs inf --opts 3", 2, ["--epochs"]),
    ("schedule --epochs nan --opts 3", 2, ["--epochs"]),
    (f"{RUN} --heads many", 2, ["many"]),
    (f"{EMBED} --data photos --device abacus", 2, ["--device abacus"]),
    (f"{EMBED} --data photos --device meta", 2, ["--device meta", "cuda:N; use auto"]),
    (f"{RUN} --aug blur", 2, ["blur"]),
]


@pytest.mark.parametrize(("line", "code", "named"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_refusal_is_one_line_and_leaves_nothing(
    world: Path, line: str, code: int, named: list[str]
) -> None:
    before = snapshot(world)
    done = sela(*words(line))
    assert (done.code, done.out) == (code, b""), done.err
    assert done.err.startswith("sela: ") and done.err.count("\n") == 1, done.err
    for word in named:
        assert word in done.err
    assert snapshot(world) == before


@pytest.mark.parametrize(
    "options",
    [
        "wide.npy",
        "logits.h5 --marginal weights.txt",
        "logits.h5 --marginal zipf:steep",
        "logits.h5 --min-size 5",
        "logits.h5 --max-size 3",
        "logits.h5 --max-memory 100",
        "logits.h5 --fixed",
        "logits.h5 --fixed --init random.h5",
        "logits.h5 --init absent.h5",
        "scores.npy --init labels.h5",
        "logits.h5 --head 0",
        "logits.h5 --head 2 --init labels.h5",
        "photos.h5 --head 0 --init labels.h5",
        "logits.h5 --head 0 --init labels.h5 --method kmeans",
        "logits.h5 --method kmeans --clusters 3",
        "scores.npy --method kmeans --clusters 13",
        "scores.npy --method kmeans --init labels.h5",
        "scores.npy --csv new.h5",
        "scores.npy -o scores.npy --force",
        "scores.npy --marginal thirds.txt --csv thirds.txt --force",
    ],
)
def test_dry_run_refuses_what_label_does(world: Path, options: str) -> None:
    good(*words("label logits.h5 --assign random -o random.h5 -q"))
    before = snapshot(world)
    line = ["label", "-o", "new.h5", *words(options)]
    real, dry = sela(*line), sela(*line, "--dry-run")
    assert real.code in (2, 65, 66) and (dry.code, dry.err) == (real.code, real.err)
    assert snapshot(world) == before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("label logits.h5 -o new.h5 --assign fair", "--assign"),
        ("label logits.h5", "--output"),
        ("label -o new.h5", "LOGITS"),
        ("label logits.h5 -o new.h5 --max-iter 0", "--max-iter"),
        (f"{EMBED} --data photos --no-such-option", "--no-such-option"),
        (f"{EMBED} --data photos --image-size 8", "--image-size"),
        ("run --data photos --out new --seed -1", "--seed"),
        (f"{TRAIN} -l labels.h5 --lr-milestones a,b", "a,b"),
        (f"{PROBE} --holdout 1", "--holdout"),
        ("schedule --epochs -1 --opts 3", "--epochs"),
        ("schedule --epochs 1 --opts 3 --relabel cubic", "cubic"),
        (f"{RUN} --preset nothing", "nothing"),
        (f"{RUN} --max-memory lots", "lots"),
        ("dance", "dance"),
    ],
)
def test_usage_error_names_the_option(world: Path, line: str, named: str) -> None:
    before = snapshot(world)
    done = sela(*words(line))
    assert (done.code, done.out) == (2, b"")
    assert "Traceback" not in done.err and "Usage:" in done.err
    assert named in done.err.rsplit("\n", 2)[-2]
    assert snapshot(world) == before


@pytest.mark.parametrize("text", ["inf", "10,nan", "1.5", "ten"])
def test_numbers_that_are_not_whole_are_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=text):
        options.whole_numbers(text, "--k")
    assert options.whole_numbers("10,2e2", "--k") == [10, 200]


@pytest.mark.parametrize(
    "text", ["lots", "\u00b2G", "0", "0.0M", "0.5", "-1G", "1.G", "1e3", "G", ""]
)
def test_sizes_that_are_none_are_a_usage_error(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write a size"):
        options.size_in_bytes(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("900M", 900 << 20), ("4g", 4 << 30), ("1.5G", 3 << 29), ("0.25K", 256)],
)
def test_sizes_may_be_decimal(text: str, size: int) -> None:
    assert options.size_in_bytes(text) == size


def test_bug_is_one_line_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*opened: object) -> NoReturn:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(envelope, "describe", broken)
    done = sela("info", "logits.h5")
    assert (done.code, done.out, done.err.count("\n")) == (70, b"", 1)
    assert "ZeroDivisionError: oops" in done.err and "--debug" in done.err


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_no_bug(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*opened: object) -> NoReturn:
        raise error("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(envelope, "describe", hungry)
    done = sela("info", "logits.h5")
    assert (done.code, done.err.count("\n")) == (70, 1)
    assert "a bug" not in done.err and "out of memory" in done.err and "; use" in done.err


@pytest.mark.parametrize(("module", "name"), [(h5py, "File"), (formats, "read_images")])
@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(errno.EIO, "read failed"), 66, "Input/output error"),
        (OSError(errno.ESTALE, "read failed"), 66, "Stale file handle"),
        (MemoryError("Unable to allocate 2 GiB"), 70, "out of memory"),
    ],
)
def test_a_machine_that_fails_is_no_damage_of_the_file(
    module: types.ModuleType,
    name: str,
    error: Exception,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*given: object) -> NoReturn:
        raise error

    monkeypatch.setattr(module, name, fails)
    done = sela(*words("export-labels labels.h5 -o new.npy"))
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert told in done.err and "damaged" not in done.err and "write it again" not in done.err


def test_too_little_memory_for_a_tensor_on_the_cpu_is_no_bug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(envelope, "describe", lambda *opened: torch.empty(1 << 60))
    done = sela("info", "logits.h5")
    assert (done.code, done.err.count("\n")) == (70, 1)
    assert done.err.startswith("sela: out of memory (can't allocate") and "; use" in done.err


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_debug", False)
    with (
        mock.patch.object(sys, "argv", words("sela --debug info absent.h5")),
        pytest.raises(Exception, match=r"absent\.h5"),
    ):
        cli.main()


@pytest.mark.parametrize("moment", ["today", "99999999999999"])
def test_bad_source_date_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", moment)
    before = snapshot(world)
    done = sela(*words("label logits.h5 -o new.h5"))
    assert (done.code, done.err.count("\n")) == (2, 1) and "SOURCE_DATE_EPOCH" in done.err
    assert snapshot(world) == before


def test_a_name_of_any_bytes_is_printed(world: Path) -> None:
    name = "caf\udce9.h5"
    done = good("label", "logits.h5", "-o", name)
    assert os.fsencode(name) in done.out and os.fsencode(name) in good("info", name).out


def test_skip_bad_leaves_the_unreadable_image_out(tmp_path: Path) -> None:
    output = str(tmp_path / "logits.h5")
    done = good(*words(EMBED), "--data", "spoilt", "--skip-bad", "-o", output, "--json")
    shown = json.loads(done.out)
    assert (shown["images"], shown["left_out"]) == (PHOTOS, 1)
    assert done.err == "warning: spoilt: 1 of 5 images can't be read, left out\n"
    with envelope.open_file(output, "logits") as (file, _):
        keys, index_N = formats.read_images(output, file)
    # The broken one comes after 0.png..3.png in the order of names.
    assert keys == [f"{number}.png" for number in range(PHOTOS)]
    assert index_N.tolist() == list(range(PHOTOS))


@pytest.mark.parametrize(
    "line",
    [
        f"{RUN} --image-size 16",
        f"{RETRAIN} -l spoilt-labels.h5",
        f"{TRAIN} -l spoilt-labels.h5",
        "pack photos -o new.h5",
    ],
)
def test_what_skip_bad_leaves_out_is_told(line: str) -> None:
    keys = [f"{number}.png" for number in range(PHOTOS)]
    write_logits("spoilt.h5", np.eye(PHOTOS)[:, :2], keys=keys)
    good(*words("label spoilt.h5 -o spoilt-labels.h5 --assign random -q"))
    done = good(*words(line.replace("photos", "spoilt")), *words("--skip-bad --dry-run --json"))
    assert json.loads(done.out)["left_out"] == 1
    assert "1 of 5 images can't be read" in done.err


def test_what_skip_bad_leaves_out_is_named(tmp_path: Path) -> None:
    """The first few to people, all of them in the result; of those asked for alone."""
    photo(tmp_path / "0.png", 0)
    broken = [f"{number}.png" for number in range(1, 9)]
    for name in broken:
        (tmp_path / name).write_bytes(b"broken")
    line = f"pack {tmp_path} -o new.h5 --skip-bad --dry-run"
    told = "8 of 9 images can't be read, left out: 1.png, 2.png, 3.png, 4.png, 5.png and 3 more\n"
    assert good(*words(line)).err == f"warning: {tmp_path}: {told}"
    told = "2 of 3 images can't be read, left out: 4.png, 8.png\n"
    assert good(*words(line), "--limit", "3").err == f"warning: {tmp_path}: {told}"
    assert json.loads(good(*words(line), "--json").out)["left_out_images"] == broken


def test_pictures_of_kinds_that_are_not_read_are_told(tmp_path: Path) -> None:
    """How many of which, once; and nothing of other files."""
    for name in ("a.png", "b.png"):
        photo(tmp_path / "mixed" / name, 0)
    for name in ("a.heic", "b/c.HEIC", "d.avif", "notes.txt"):
        (tmp_path / "mixed" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mixed" / name).touch()
    line = f"pack {tmp_path}/mixed -o new.h5 --dry-run --json"
    done = good(*words(line))
    assert (
        done.err == f"warning: {tmp_path}/mixed: left out what is not read: .avif (1), .heic (2)\n"
    )
    assert json.loads(done.out)["images"] == 2 and not good(*words(line), "--quiet").err


def test_probabilities_that_are_taken_for_logits_are_hinted_at(tmp_path: Path) -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 12)
    np.save(tmp_path / "shares.npy", shares.astype(np.float16))
    np.save(tmp_path / "signed.npy", shares - [[1, 0, -1]])
    for name, more, told in (
        ("shares", "", True),
        ("shares", "--input-kind probabilities", False),
        ("shares", "--quiet", False),
        ("shares", "--assign random", False),
        ("signed", "", False),
    ):
        line = f"label {tmp_path}/{name}.npy -o {tmp_path}/labels.h5 --force {more}"
        assert ("--input-kind probabilities" in good(*words(line)).err) == told


def test_unconverged_labels_are_written_and_exit_75(tmp_path: Path) -> None:
    output = str(tmp_path / "labels.h5")
    line = [*words("label logits.h5 --max-iter 1 --tol 1e-12 -o"), output]
    done = sela(*line)
    assert done.code == 75 and done.err.count("\n") == 1
    assert not any(head.attributes["converged"] for head in formats.read_labels(output).heads)
    more = done.err.split("go on with ")[1].split(",")[0]
    assert sela(*line, *words(more)).code == 75


def test_unconverged_labels_in_a_pipe_are_nothing_to_go_on_with() -> None:
    done = sela(*words("label logits.h5 --max-iter 1 --tol 1e-12 -o -"))
    assert done.code == 75 and done.out
    assert "larger --max-iter or --tol" in done.err and "--init" not in done.err


# ---- pipes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("logits.h5", ""),
        ("scores.h5", ""),
        ("scores.h5", "::/deep/scores"),
        ("scores.npy", ""),
        ("scores.npz", ""),
        ("scores.npz", "::scores"),
        ("scores.safetensors", ""),
    ],
)
def test_label_through_pipes_is_label_of_files(tmp_path: Path, path: str, name: str) -> None:
    output, piped = str(tmp_path / "labels.h5"), str(tmp_path / "piped.h5")
    good("label", path + name, "-o", output)
    # `--`: without it the name would look like an option.
    done = good("label", "-o", "-", "--", "-" + name, stdin=Path(path).read_bytes())
    Path(piped).write_bytes(done.out)
    assert envelope.read_header(piped).digest == envelope.read_header(output).digest
    with h5py.File(piped) as file:
        assert envelope.payload_digest(file) == file.attrs["digest"]
    assert "Traceback" not in done.err


def test_the_array_of_a_pipe_is_named_as_it_has_to_be_typed(tmp_path: Path) -> None:
    line = ("label", "-o", str(tmp_path / "labels.h5"))
    stdin = Path("two.npz").read_bytes()
    done = sela(*line, "-", stdin=stdin)
    assert done.code == 65
    named = done.err.split("at the end of the line: ")[1].split()
    good(*line, *named, stdin=stdin)


def test_piped_file_is_the_file_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no time is measured (`random` solves nothing) and the date is given."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    output = str(tmp_path / "labels.h5")
    line = words("label logits.h5 --assign random -o")
    good(*line, output)
    assert good(*line, "-").out == Path(output).read_bytes()


@pytest.mark.parametrize("line", ["info - --json", "metrics - --truth truth.npy --json"])
def test_labels_come_through_a_pipe(line: str) -> None:
    by_name = json.loads(good(*words(line.replace("-", "labels.h5", 1))).out)
    piped = json.loads(good(*words(line), stdin=Path("labels.h5").read_bytes()).out)
    strip = {"file", "labels"}
    assert {k: v for k, v in piped.items() if k not in strip} == {
        k: v for k, v in by_name.items() if k not in strip
    }


def test_info_of_labels_says_what_label_said_and_by_which_options(tmp_path: Path) -> None:
    output = str(tmp_path / "labels.h5")
    said = good(*words("label logits.h5 --lamb 7.5 -o"), output).out.decode().splitlines()
    text = good("info", output).out.decode().splitlines()
    assert [line for line in text if line.startswith("head ")] == said[1:]
    assert all("gap " in line and " of 4" in line for line in said[1:])
    parameters = text[text.index("parameters:") + 1 : text.index("datasets:")]
    assert ["lamb", "7.5"] in [line.split() for line in parameters]
    shown = json.loads(good("info", output, "--json").out)
    assert [head["smallest"] for head in shown["heads"]] == [4, 4]
    assert all(0 <= head["gap"] < 1e-3 for head in shown["heads"])
    assert "heads" not in json.loads(good("info", "tiny.h5", "--json").out)


def test_labels_of_a_pipe_are_compared_with_the_truth_and_with_others() -> None:
    line = words("metrics - --truth truth.npy --against labels.h5 --json")
    shown = json.loads(good(*line, stdin=Path("labels.h5").read_bytes()).out)
    assert [row["changed"] for row in shown["rounds"]] == [0, 0] and len(shown["heads"]) == 2


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("metrics - --against -", "labels.h5"),
        ("label - -o new.h5 --init -", "logits.h5"),
    ],
)
def test_a_pipe_is_one_input(world: Path, line: str, name: str) -> None:
    before = snapshot(world)
    done = sela(*words(line), stdin=Path(name).read_bytes())
    assert done.code == 2 and "two inputs can't both be standard input" in done.err
    assert snapshot(world) == before


@pytest.mark.parametrize("line", ["label - -o new.h5", "info -"])
@pytest.mark.parametrize("stdin", [b"", b"no file", b"\x89HDF\r\n\x1a\n"])
def test_rubbish_through_a_pipe_is_refused(world: Path, line: str, stdin: bytes) -> None:
    before = snapshot(world)
    done = sela(*words(line), stdin=stdin)
    assert done.code == 65 and done.err.startswith("sela: -") and done.err.count("\n") == 1
    assert snapshot(world) == before


def test_csv_goes_to_standard_output(tmp_path: Path) -> None:
    output = str(tmp_path / "labels.h5")
    done = good(*words("label logits.h5 --csv - -o"), output)
    rows = [line.split(",") for line in done.out.decode().splitlines()]
    assert b"\r" not in done.out
    labels = formats.read_labels(output)
    assert rows[0] == ["key", "label_0", "label_1"]
    assert [row[0] for row in rows[1:]] == labels.keys
    for number, head in enumerate(labels.heads, start=1):
        assert [int(row[number]) for row in rows[1:]] == head.labels_N.tolist()


def test_reader_that_leaves_is_no_error() -> None:
    """More text than a pipe holds, into a pipe whose reader is gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sela_cli", *words("schedule --epochs 400 --opts 20000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 1


# ---- JSON -------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every command prints with --json, from a walk through all stages."""
    folder = tmp_path_factory.mktemp("stages")
    shown: dict[str, dict[str, Any]] = {}

    def call(line: str, *more: str) -> None:
        done = good(*words(line.replace("@", f"{folder}/")), *more, "--json")
        (text,) = done.out.decode().splitlines()
        shown[line.split()[0]] = json.loads(text, parse_constant=refuse)

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    with contextlib.chdir(world):
        call("embed --data photos --heads 2x3 -o @logits.h5", *words(TINY))
        call("label @logits.h5 -o @labels.h5")
        call("train --data photos -l @labels.h5 -o @first.h5 --epochs 1", *words(TINY))
        other = "--arch resnet18 --image-size 16 --batch-size 4 --rotation --device cpu"
        call(f"retrain --data photos -l @labels.h5 -o @fresh.h5 --epochs 1 {other}")
        call("probe --data photos -c @first.h5 -o @probe.h5 --method knn --k 1 --device cpu")
        call("metrics @labels.h5 --truth photos")
        call("info @first.h5")
        call("schedule --epochs 160 --opts 80")
        call("pack photos -o @images.h5 --size 16")
        call("export @first.h5 -o @backbone.safetensors")
        network = "--arch alexnet-small --image-size 16 --heads 2"
        call(f"import @backbone.safetensors {network} -o @start.h5")
        call("run --data photos --out @run --heads 2 --epochs 1 --opts 1", *words(TINY))
        call("report @run -o @report.html")
        call("export-labels @labels.h5 -o @labels.csv --links @links --data photos")
        call("export-logits @logits.h5 -o @logits.npy --head 1")
    return shown


def test_every_command_prints_one_json_object(stages: dict[str, dict[str, Any]]) -> None:
    # Fine-tuning is for one data set, which tests/test_finetune.py has.
    assert set(stages) == set(COMMANDS) - {"finetune"}
    assert all(isinstance(shown, dict) and shown for shown in stages.values())


def test_json_tells_what_was_done(stages: dict[str, dict[str, Any]]) -> None:
    assert (stages["embed"]["images"], stages["embed"]["heads"]) == (PHOTOS, [2, 2, 2])
    assert [head["clusters"] for head in stages["label"]["heads"]] == [2, 2, 2]
    assert [head["smallest"] for head in stages["label"]["heads"]] == [2, 2, 2]
    assert (stages["train"]["from_step"], stages["train"]["to_step"]) == (0, 1)
    # Labels of another architecture's.
    assert stages["retrain"]["to_step"] == 1
    assert stages["info"]["kind"] == "checkpoint"
    assert [entry["role"] for entry in stages["info"]["inputs"]] == ["labels"]
    assert len(stages["schedule"]["positions"]) == 79
    assert all(0 <= row["top1"] <= 1 for row in stages["probe"]["results"])
    assert len(stages["metrics"]["heads"]) == 3
    assert set(stages["run"]["files"]) >= {"labels.h5", "checkpoint.h5", "rounds.csv"}
    assert all(Path(path).is_file() for path in stages["run"]["files"].values())
    assert stages["report"]["clusters"] == [2]
    assert stages["export-labels"]["rows"] == PHOTOS
    assert stages["export-logits"]["shape"] == [PHOTOS, 2]


def test_an_epoch_that_is_past_is_refused_by_train_and_its_dry_run(world: Path) -> None:
    good(*words(f"{TRAIN_TWICE} --epochs 2 --batch-size 4 -o trained.h5"))
    before = snapshot(world)
    line = words("train --data photos -l photo-labels.h5 -c trained.h5 --to 1 -o new.h5 -q")
    for extra in ([], ["--dry-run"]):
        done = sela(*line, *extra)
        assert (done.code, done.err) == (2, "sela: --to 1 lies before epoch 2, already reached\n")
    done = sela(*words("train --data photos -l photo-labels.h5 -c trained.h5 -o new.h5 -q"))
    assert done.code == 2 and done.err.endswith("epoch 2; name a larger --epochs\n")
    assert snapshot(world) == before


@pytest.mark.parametrize(
    "line",
    [
        f"{EMBED} --data photos",
        "label logits.h5 -o new.h5",
        f"{TRAIN} -l photo-labels.h5",
        f"{RETRAIN} -l photo-labels.h5",
        f"{RUN} --image-size 16",
    ],
)
def test_dry_run_prints_a_plan_and_neither_writes_nor_decodes_all(
    world: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(world)
    monkeypatch.setattr(Images, "hold", mock.Mock(side_effect=AssertionError))
    assert json.loads(good(*words(line), "--dry-run", "--json").out)
    assert good(*words(line), "--dry-run").out
    assert snapshot(world) == before


@pytest.mark.parametrize(
    ("line", "named"),
    [
        *[
            (f"{verb} --device {device}", f"--device {device}")
            for verb in (
                *(f"{EMBED} --data photos", f"{TRAIN} -l photo-labels.h5", RUN, PROBE),
                f"{RETRAIN} -l photo-labels.h5",
            )
            for device in ("abacus", "cuda:99")
        ],
        ("embed --data photos --arch vgg --heads 2 -o new.h5", "--arch vgg is none of"),
        ("embed --data photos --arch resnet18 --heads 5x -o new.h5", "--heads 5x: write"),
        ("train --data photos -l photo-labels.h5 --arch vgg -o new.h5", "--arch vgg is none of"),
        ("retrain --data photos -l photo-labels.h5 --arch vgg -o new.h5", "--arch vgg is none of"),
        ("run --data photos --arch vgg --out new", "--arch vgg is none of"),
    ],
)
def test_what_can_not_be_is_refused_before_images_are_decoded(
    world: Path, line: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Images, "hold", mock.Mock(side_effect=AssertionError))
    done = sela(*words(line))
    assert done.code == 2 and named in done.err, done.err


# ---- help -------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """All pages in one process, whose imports Python lists."""
    code = (
        "import sys\n"
        "from sela_cli.cli import main\n"
        f"for page in ([], *([name] for name in {COMMANDS})):\n"
        "    sys.argv = ['sela', *page, '--help']\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    modules = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert {"typer", "sela_cli.commands.run"} <= modules
    heavy = {"torch", "torchvision", "numpy", "h5py", "rich", "scipy", "sklearn", "PIL"}
    heavy |= {"matplotlib", "pyarrow", "tensorboard"}
    assert not {module.split(".")[0] for module in modules} & heavy
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_page_explains_every_option(name: str) -> None:
    page = " ".join(good(name, "--help").out.decode().split())
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    assert command.help and command.epilog and "Example" in command.epilog
    for parameter in command.params:
        assert parameter.help, parameter.name
        # Lines may break after a hyphen.
        assert parameter.help.replace(" ", "") in page.replace(" ", "")
        for option in parameter.opts if parameter.param_type_name == "option" else []:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", page), option


@pytest.mark.parametrize(("name", "told"), [("run", False), ("train", True), ("embed", True)])
def test_help_tells_whether_settings_of_a_checkpoint_hold(name: str, told: bool) -> None:
    """A run takes no more than its weights."""
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    helps = {parameter.name: parameter.help for parameter in command.params}
    assert [("checkpoint" in helps[option]) for option in ("seed", "precision")] == [told, told]


@pytest.mark.parametrize("name", COMMANDS)
def test_example_of_the_help_page_is_a_command_line(name: str) -> None:
    """It parses: its options exist. The files that it names need not."""
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    text = " ".join(command.epilog.split())
    examples = re.findall(r"sela ([\w-]+) (.*?)(?=\.? ?sela |\.?$)", text)
    assert examples and all(verb == name for verb, _ in examples)
    for _, arguments in examples:
        command.make_context(name, arguments.split())


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    page = good("--help").out.decode()
    assert all(re.search(rf"^  {name} ", page, re.MULTILINE) for name in COMMANDS)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.exit_code for kind in kinds if kind is not errors.SelaError}
    assert all(re.search(rf"\b{code}\b", page) for code in codes | {0, 70, 130})


def test_version() -> None:
    assert good("--version").out.decode() == f"sela {__version__}\n"


# ---- signals ----------------------------------------------------------------


Stop = Callable[[int, Callable[[], object]], None]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """`stop_at(n, answer)`: the n-th time a stage asks whether to stop, `answer()` tells it."""

    def arm(count: int, answer: Callable[[], object]) -> None:
        asked = itertools.count(1)
        monkeypatch.setattr(interrupt, "requested", lambda: next(asked) == count and answer())

    return arm


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None requested, and listened to as before when the test is over."""
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    monkeypatch.setattr(interrupt, "_requested", False)
    # The tests may run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signal_is_a_request(name: str) -> None:
    interrupt.listen()
    assert not interrupt.requested()
    os.kill(os.getpid(), getattr(signal, name))
    assert interrupt.requested()


@pytest.mark.usefixtures("signals")
def test_under_nohup_a_lost_terminal_is_none_of_ours() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not interrupt.requested()


def test_a_signal_ends_what_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*opened: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(interrupt, "_requested", False)
    monkeypatch.setattr(envelope, "describe", waits)
    done = sela("info", "absent.h5")
    assert done.code == 75 and "run it again" in done.err


@pytest.mark.parametrize(
    "line", ["metrics labels.h5 --truth truth.npy", "export-logits scores.npy -o new.npy"]
)
def test_a_signal_while_an_array_is_opened_is_not_taken_for_damage(
    monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def load(*opened: object, **options: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(interrupt, "_requested", False)
    monkeypatch.setattr(np, "load", load)
    done = sela(*words(line))
    assert done.code == 75 and "stopped by a signal; run it again" in done.err


# The first question comes while images are decoded, the second while they are embedded.
@pytest.mark.parametrize("question", [1, 2])
def test_ctrl_c_exits_130_and_leaves_nothing(world: Path, stop_at: Stop, question: int) -> None:
    before = snapshot(world)
    stop_at(question, lambda: signal.raise_signal(signal.SIGINT))
    # What a shell starts in the background ignores Ctrl-C, this test's process too.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = sela(*words(EMBED), "--data", "photos")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.code, done.out) == (130, b"") and "Traceback" not in done.err
    assert snapshot(world) == before


@pytest.mark.parametrize("question", [1, 2])
def test_sigterm_in_embed_exits_75_and_the_same_command_goes_on(
    world: Path, tmp_path: Path, stop_at: Stop, question: int
) -> None:
    line = [*words(EMBED)[:-1], str(tmp_path / "new.h5"), "--data", "photos", "--batch-size", "1"]
    before = snapshot(world)
    stop_at(question, lambda: True)
    done = sela(*line)
    assert (done.code, done.out, done.err.count("\n")) == (75, b"", 1)
    assert snapshot(world) == before
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([] if question == 1 else ["new.h5.unfinished"])
    good(*line)
    assert [path.name for path in tmp_path.iterdir()] == ["new.h5"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every step of an optimizer."""
    taken: list[None] = []
    step = torch.optim.SGD.step

    def counted(*arguments: Any, **options: Any) -> Any:
        taken.append(None)
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    return taken


def stopped_after(
    count: int, line: list[str], steps: list[None], monkeypatch: pytest.MonkeyPatch
) -> Done:
    """What the command does where a signal comes after so many steps."""
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "requested", lambda: len(steps) == count)
        return sela(*line)


TRAIN_TWICE = f"{TRAIN.replace(' -o new.h5', '')} -l photo-labels.h5 --device cpu -q"


def test_training_goes_on_after_sigterm_as_if_nothing_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[None]
) -> None:
    """Dropout, augmentation, order and momentum included."""
    line = words(f"{TRAIN_TWICE} --epochs 2 --batch-size 2 --aug paper -o")
    whole, parts = str(tmp_path / "whole.h5"), str(tmp_path / "parts.h5")
    good(*line, whole)
    assert len(steps) == 4

    steps.clear()
    done = stopped_after(2, [*line, parts], steps, monkeypatch)
    assert (done.code, done.err.count("\n")) == (75, 1) and "step 2 of 4" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.h5.unfinished", "whole.h5"]
    assert formats.read_checkpoint(f"{parts}.unfinished").step == 2

    steps.clear()
    good(*line, parts)
    assert len(steps) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.h5", "whole.h5"]
    assert envelope.read_header(parts).digest == envelope.read_header(whole).digest


def test_unfinished_state_of_other_settings_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[None]
) -> None:
    output = str(tmp_path / "out.h5")
    line = words(f"{TRAIN_TWICE} --epochs 1 --batch-size 2 -o {output}")
    assert stopped_after(1, line, steps, monkeypatch).code == 75
    done = sela(*line, "--lr", "0.001", "--aug", "paper")
    assert done.code == 73 and "left by a call that differs in aug, lr;" in done.err
    steps.clear()
    good(*line, "--lr", "0.001", "--force")
    assert len(steps) == 2


def test_a_goal_before_the_unfinished_state_says_what_stands_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[None]
) -> None:
    output = str(tmp_path / "out.h5")
    line = words(f"{TRAIN_TWICE} --epochs 2 --batch-size 2 -o {output}")
    assert stopped_after(3, line, steps, monkeypatch).code == 75
    done = sela(*line, "--to", "1")
    assert done.code == 2 and done.err.endswith(f"; rm {output}.unfinished to begin anew\n")


def test_damaged_unfinished_state_is_named(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    (tmp_path / "out.h5.unfinished").write_bytes(b"no HDF5")
    for line in (f"{TRAIN_TWICE} --epochs 1 --batch-size 2", f"{EMBED} --data photos --force"):
        done = sela(*words(f"{line} -o {output}"))
        assert done.code == 65 and done.err.endswith(f"; rm {output}.unfinished\n")
        assert not output.exists()


@pytest.mark.parametrize("arithmetic", ["float32", "auto"])
@pytest.mark.parametrize("first", ["train", "embed"])
def test_what_another_command_has_left_does_not_stand_in_the_way(
    first: str, arithmetic: str, tmp_path: Path, stop_at: Stop
) -> None:
    lines = {
        "train": f"{TRAIN_TWICE} --epochs 1 --batch-size 2 --precision {arithmetic}",
        "embed": f"{EMBED} --data photos --batch-size 2 --device cpu --precision {arithmetic}"
        " --force",
    }
    output = tmp_path / "out.h5"
    # The first question comes while images are decoded.
    stop_at(2, lambda: True)
    assert sela(*words(f"{lines.pop(first)} -o {output}")).code == 75
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5.unfinished"]
    (second,) = lines.values()
    good(*words(f"{second} -o {output}"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]
