"""Our files in the forms of other programs: CSV, Parquet, .npy, and folders of links.

N images, K clusters, T heads, D features.
"""

from __future__ import annotations

import csv
import os
import shlex
import shutil
from pathlib import Path

import numpy as np

from sela_cli import outputs
from sela_cli.errors import BadData, CannotCreate, UsageError
from sela_cli.formats import Labels
from sela_cli.keys import RowNumbers
from sela_cli.scores import open_scores

LABEL_SUFFIXES = (".csv", ".parquet", ".npy")
_TILE_ROWS = 4096
# Lines of CSV that are made at a time.
_LINES = 1 << 16
# Bytes of a name: file systems take 255, a row's number included.
_LONGEST = 200


def write_labels_as(labels: Labels, output: str, force: bool = False) -> None:
    """Labels as the ending of `output` says.

    .csv and .parquet: a row an image, columns `key` and `label` (`label_0`.. of several
    heads). .npy: int32, (N,) of one head and (N, T) of several, in the file's order.
    Raises UsageError for another ending.
    """
    suffix = Path(output).suffix
    if suffix not in LABEL_SUFFIXES:
        raise UsageError(f"{output}: its ending is none of {', '.join(LABEL_SUFFIXES)}")
    if suffix == ".csv":
        write_csv(output, labels, force)
    elif suffix == ".parquet":
        _write_parquet(output, labels, force)
    else:
        columns = np.stack([head.labels_N for head in labels.heads], axis=1).astype(np.int32)
        with outputs.replacing(output, force) as partial, partial.open("wb") as stream:
            np.save(stream, columns[:, 0] if len(labels.heads) == 1 else columns)


def write_csv(path: str, labels: Labels, force: bool = False) -> None:
    """One line an image: its key, then the label of each head. Written whole or not at all."""
    with (
        outputs.replacing(path, force) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        # Lines end as awk and cut read them; a name with a line's end in it is quoted then too.
        odd = not isinstance(labels.keys, RowNumbers) and any("\r" in key for key in labels.keys)
        writer = csv.writer(
            stream,
            lineterminator="\n",
            quoting=csv.QUOTE_NONNUMERIC if odd else csv.QUOTE_MINIMAL,
        )
        writer.writerow(["key", *labels.columns])
        for start in range(0, len(labels.keys), _LINES):
            some = slice(start, start + _LINES)
            columns = [head.labels_N[some].tolist() for head in labels.heads]
            writer.writerows(zip(labels.keys[some], *columns, strict=True))


def _write_parquet(output: str, labels: Labels, force: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        keys = pyarrow.array(labels.keys, pyarrow.string())
    except UnicodeEncodeError as error:
        raise BadData(
            f"{output}: an image's name is not UTF-8 ({error}), as Parquet's strings are",
            "write .csv or .npy",
        ) from error
    columns = [pyarrow.array(head.labels_N, pyarrow.int32()) for head in labels.heads]
    table = pyarrow.table([keys, *columns], names=["key", *labels.columns])
    with outputs.replacing(output, force) as partial:
        parquet.write_table(table, partial)


def write_links(labels: Labels, images: str, output: str) -> int:
    """A folder of symbolic links for each cluster: OUTPUT/head-0/cluster-007/0000012-cat.jpg.

    `images` is the folder that was labelled. Returns the number of links. Raises UsageError
    where one of the two is in the other, BadData where an image does not lie there, CannotCreate
    where `output` exists: a folder that may hold more than links is never replaced.
    """
    root, target = Path(images).resolve(), Path(output)
    outputs.check_outside(output, images)
    if root.is_relative_to(target.resolve()):
        raise UsageError(f"{images} is in {output}", "name another folder")
    for key in labels.keys:
        if not (root / key).is_file():
            raise BadData(f"{images} has no '{key}'", "give the folder that was labelled")
    if target.exists():
        mend = "name another folder"
        if _holds_links_alone(target):
            mend = f"rm -r {shlex.quote(output)}, or {mend}"
        raise CannotCreate(f"{output} exists", mend)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for number, head in enumerate(labels.heads):
            width = len(str(len(head.potentials_K) - 1))
            by_cluster = np.argsort(head.labels_N, kind="stable")
            members = np.split(by_cluster, head.usage_K.cumsum()[:-1])
            for cluster, rows in enumerate(members):
                folder = partial / f"head-{number}" / f"cluster-{cluster:0{width}d}"
                folder.mkdir(parents=True)
                for row in rows.tolist():
                    # The row's number keeps apart what has one name in two subfolders.
                    key = labels.keys[row]
                    (folder / f"{row:07d}-{_ending(Path(key).name)}").symlink_to(root / key)
        partial.rename(target)
    except OSError as error:
        raise CannotCreate(f"{output}: {error.strerror}", "choose another --links") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(labels.heads) * len(labels.keys)


def _holds_links_alone(path: Path) -> bool:
    """Whether nothing is lost with a folder but links in the folders of clusters."""
    return path.is_dir() and all(
        each.match("head-*/cluster-*/*") if each.is_symlink() else each.is_dir()
        for each in path.rglob("*")
    )


def _ending(name: str) -> str:
    """As much of a name as has room behind a number."""
    return os.fsdecode(os.fsencode(name)[-_LONGEST:])


def write_logits_as_npy(
    path: str, output: str, head: int = 0, features: bool = False, force: bool = False
) -> tuple[int, int]:
    """A head's logits, (N, K), or the features, (N, D), as stored; returns the shape.

    Features and heads are multiplied out. Raises UsageError where there is no such head,
    BadData where logits were stored and features are asked for, and as `check_output` does.
    """
    outputs.check_output(output, force, path)
    with open_scores(path) as scores:
        if not 0 <= head < len(scores.heads):
            raise UsageError(f"{path} has heads 0..{len(scores.heads) - 1}, no head {head}")
        matrix = scores.heads[head]
        if features:
            if scores.features is None:
                raise BadData(f"{path} holds logits, no features", "sela embed --store features")
            matrix = scores.features.matrix
        # Not by a mapping: a disk that is full would kill the process.
        with outputs.replacing(output, force) as partial, partial.open("wb") as stream:
            dtype = matrix.read(slice(0, 1)).dtype
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": matrix.shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, matrix.shape[0], _TILE_ROWS):
                stream.write(matrix.read(slice(start, start + _TILE_ROWS)).tobytes())
            return matrix.shape
