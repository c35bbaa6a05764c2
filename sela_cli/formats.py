"""What is in our files, kind by kind: labels, logits, images, checkpoints, results of probes.

docs/schema.md is the contract. N images, K clusters, T heads, D features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from sela_cli.envelope import (
    Header,
    Part,
    Provenance,
    array,
    create,
    dataset,
    datasets,
    open_file,
    plain,
)
from sela_cli.errors import BadData
from sela_cli.keys import named, stored

LABEL_ATTRIBUTES = (
    "assign",
    "lamb",
    "tol",
    "residual",
    "n-iters",
    "converged",
    "objective",
    "lower-bound",
)
# Earlier files lack these.
LATER_LABEL_ATTRIBUTES = ("status", "bytes-read")
# Here, as `networks` takes torch.
ARCHS = ("alexnet", "alexnet-small", "resnet18", "resnet34", "resnet50", "resnet50-v2")
_LONG_TEXT = 64
# As --image-size.
_LEAST_SIDE = 16


def unsolved(assign: str) -> dict[str, Any]:
    """Attributes of labels that no solve made: what belongs to one is NaN."""
    nothing: dict[str, Any] = dict.fromkeys(LABEL_ATTRIBUTES, float("nan"))
    nothing |= {"assign": assign, "n-iters": 0, "converged": True}
    return nothing | {"status": "unsolved", "bytes-read": 0}


@dataclass
class HeadLabels:
    """One head's part of a labels file; see docs/schema.md for the attributes."""

    labels_N: np.ndarray
    potentials_K: np.ndarray
    attributes: dict[str, Any]
    trace: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def usage_K(self) -> np.ndarray:
        """Images in each cluster."""
        return np.bincount(self.labels_N, minlength=len(self.potentials_K))


@dataclass
class Labels:
    """A labels file."""

    keys: Sequence[str]
    index_N: np.ndarray
    heads: list[HeadLabels]
    header: Header | None = None

    @property
    def clusters(self) -> list[int]:
        """K of each head."""
        return [len(head.potentials_K) for head in self.heads]

    @property
    def columns(self) -> list[str]:
        """What tables call the heads: `label`, or `label_0`, `label_1`, ... of several."""
        count = len(self.heads)
        return ["label"] if count == 1 else [f"label_{number}" for number in range(count)]


@dataclass
class Checkpoint:
    """A checkpoint file: arrays by torch's names, and where training stands."""

    model: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    arch: str
    image_size: int
    heads: list[int]
    step: int
    epoch: float
    recipe: dict[str, Any]
    labels_digest: str = ""
    losses: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    header: Header | None = None


PROBE_DTYPE = np.dtype(
    [
        ("layer", "S32"),
        ("method", "S16"),
        ("head", "S16"),
        ("setting", "S64"),
        ("lr", "f8"),
        ("epoch", "i8"),
        ("split", "S32"),
        ("n", "i8"),
        ("top1", "f8"),
        ("top5", "f8"),
        ("loss", "f8"),
    ]
)
PRECISION_DTYPE = np.dtype([("class", "S32"), ("positives", "i8"), ("ap11", "f8"), ("ap", "f8")])


def _write_images(file: h5py.File, keys: Sequence[str], index_N: np.ndarray) -> None:
    file["index"] = np.asarray(index_N, dtype=np.int64)
    _write_texts(file, "keys", keys)


def _write_texts(file: h5py.File, name: str, texts: Sequence[str]) -> None:
    longest = max((some_n.dtype.itemsize for _, some_n in stored(texts)), default=1)
    utf8 = h5py.string_dtype("utf-8", longest)
    # One long name makes every other as long, by zeros.
    gzip = {"compression": "gzip", "compression_opts": 1} if longest > _LONG_TEXT else {}
    written = file.create_dataset(name, (len(texts),), utf8, **gzip)
    for start, some_n in stored(texts):
        written[start : start + len(some_n)] = some_n.astype(utf8)


@contextmanager
def create_images(
    path: str,
    keys: Sequence[str],
    index_N: np.ndarray,
    provenance: Provenance,
    *,
    side: int,
    truth_N: np.ndarray | None = None,
    classes: Sequence[str] = (),
    force: bool = False,
) -> Iterator[h5py.Dataset]:
    """Write a file of images; yields its (N, 3, side, side) dataset, to be filled by rows.

    Contiguous and uncompressed, so that it can be memory-mapped.
    """
    with create(path, "images", provenance, force) as file:
        _write_images(file, keys, index_N)
        if truth_N is not None:
            file["labels"] = truth_N.astype(np.int64)
        if truth_N is not None and classes:
            _write_texts(file, "classes", classes)
        yield file.create_dataset("images", (len(keys), 3, side, side), dtype=np.uint8)


@contextmanager
def create_logits(
    path: str,
    keys: Sequence[str],
    index_N: np.ndarray,
    provenance: Provenance,
    *,
    columns: Mapping[str, int],
    dtype: str,
    heads: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    force: bool = False,
    part: Part | None = None,
) -> Iterator[dict[str, h5py.Dataset]]:
    """Write a logits file; yields its (N, columns) datasets, to be filled by rows.

    `columns` names them: `logits/0`.. (explicit form), or `features` together with
    `heads`, pairs of weight (K, D) and bias (K,) (factored form). For `part` see `create`;
    its `done` is for the caller to keep.
    """
    with create(path, "logits", provenance, force, part) as file:
        if part is None or not part.done:
            _write_images(file, keys, index_N)
            for number, (weight_KD, bias_K) in enumerate(heads):
                file[f"heads/{number}/weight"] = weight_KD.astype(np.float32)
                file[f"heads/{number}/bias"] = bias_K.astype(np.float32)
            for name, width in columns.items():
                file.create_dataset(name, (len(keys), width), dtype=dtype)
        yield {name: file[name] for name in columns}


def write_labels(path: str, labels: Labels, provenance: Provenance, force: bool = False) -> None:
    """Write a labels file."""
    with create(path, "labels", provenance, force) as file:
        _write_images(file, labels.keys, labels.index_N)
        shape = len(labels.heads), len(labels.keys)
        written = file.create_dataset("labels", shape, np.int32)
        for number, head in enumerate(labels.heads):
            written[number] = head.labels_N
        for number, head in enumerate(labels.heads):
            potentials = file.create_dataset(
                f"potentials/{number}", data=head.potentials_K, dtype=np.float64
            )
            potentials.attrs.update({name: head.attributes[name] for name in LABEL_ATTRIBUTES})
            for name in LATER_LABEL_ATTRIBUTES:
                if name in head.attributes:
                    potentials.attrs[name] = head.attributes[name]
            file[f"usage/{number}"] = head.usage_K.astype(np.int64)
            for name, values in head.trace.items():
                file[f"trace/{number}/{name}"] = values


def write_checkpoint(
    path: str, checkpoint: Checkpoint, provenance: Provenance, force: bool = False
) -> None:
    """Write a checkpoint file."""
    with create(path, "checkpoint", provenance, force) as file:
        for group, arrays in (("model", checkpoint.model), ("optimizer", checkpoint.optimizer)):
            file.create_group(group)
            for name, array in arrays.items():
                file[f"{group}/{name}"] = array
        file["losses"] = checkpoint.losses
        file.attrs.update(
            {
                "arch": checkpoint.arch,
                "image-size": checkpoint.image_size,
                "heads": json.dumps(checkpoint.heads),
                "step": checkpoint.step,
                "epoch": checkpoint.epoch,
                "recipe": json.dumps(checkpoint.recipe),
                "labels-digest": checkpoint.labels_digest,
            }
        )


def write_probe(
    path: str, rows: Sequence[Mapping[str, Any]], provenance: Provenance, force: bool = False
) -> None:
    """Write a probe file, one row a measurement."""
    table = _table(rows, PROBE_DTYPE)
    with create(path, "probe", provenance, force) as file:
        file["results"] = table


def write_precisions(
    path: str,
    task: str,
    rows: Sequence[Mapping[str, Any]],
    provenance: Provenance,
    force: bool = False,
) -> None:
    """Write a finetune file, one row a class."""
    table = _table(rows, PRECISION_DTYPE)
    with create(path, "finetune", provenance, force) as file:
        file["results"] = table
        file.attrs["task"] = task


def _table(rows: Sequence[Mapping[str, Any]], dtype: np.dtype) -> np.ndarray:
    return np.array([tuple(row[name] for name in dtype.names or ()) for row in rows], dtype)


def read_images(path: str, file: h5py.File) -> tuple[Sequence[str], np.ndarray]:
    """The keys and index that `logits` and `labels` name their rows with."""
    raw = dataset(path, file, "keys", (None,), "SO", by_rows=True)[()]
    keys = named(raw)
    return keys, array(path, file, "index", (len(keys),), "iu")


def read_labels(path: str) -> Labels:
    """Read a labels file. Raises BadData where a part is missing or does not fit."""
    with open_file(path, "labels") as (file, header):
        return labels_of(path, file, header)


def labels_of(path: str, file: h5py.File, header: Header) -> Labels:
    """The labels of an open file, which errors call `path`."""
    keys, index_N = read_images(path, file)
    labels_TN = array(path, file, "labels", (None, len(keys)), "iu")
    heads = []
    for number, labels_N in enumerate(labels_TN):
        potentials = dataset(path, file, f"potentials/{number}", (None,))
        if labels_N.size and not 0 <= labels_N.min() <= labels_N.max() < len(potentials):
            raise BadData(
                f"{path}: dataset 'labels', head {number}: a label is outside "
                f"0..{len(potentials) - 1}"
            )
        missing = [name for name in LABEL_ATTRIBUTES if name not in potentials.attrs]
        if missing:
            raise BadData(f"{path}: 'potentials/{number}' lacks attribute {missing[0]}")
        known = [*LABEL_ATTRIBUTES]
        known += [name for name in LATER_LABEL_ATTRIBUTES if name in potentials.attrs]
        trace = f"trace/{number}"
        heads.append(
            HeadLabels(
                labels_N=labels_N,
                potentials_K=potentials[()],
                attributes={name: plain(potentials.attrs[name]) for name in known},
                trace=datasets(path, file, trace) if trace in file else {},
            )
        )
    if not heads:
        raise BadData(f"{path}: dataset 'labels' has no head")
    return Labels(keys, index_N, heads, header)


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint file. Raises BadData where a part is missing, or no network has it."""
    with open_file(path, "checkpoint") as (file, header):
        model, optimizer = datasets(path, file, "model"), datasets(path, file, "optimizer")
        try:
            state = Checkpoint(
                model=model,
                optimizer=optimizer,
                arch=str(plain(file.attrs["arch"])),
                image_size=int(file.attrs["image-size"]),
                heads=[int(clusters) for clusters in json.loads(file.attrs["heads"])],
                step=int(file.attrs["step"]),
                epoch=float(file.attrs["epoch"]),
                recipe=json.loads(file.attrs["recipe"]),
                labels_digest=str(plain(file.attrs["labels-digest"])),
                losses=array(path, file, "losses", (None,), "f"),
                header=header,
            )
        except (KeyError, ValueError, TypeError) as error:
            raise BadData(f"{path}: bad checkpoint attributes ({error})") from error
        for name, can_be in (
            ("arch", state.arch in ARCHS),
            ("image-size", state.image_size >= _LEAST_SIDE),
            ("heads", min(state.heads, default=0) > 0),
            ("recipe", isinstance(state.recipe, dict)),
        ):
            if not can_be:
                value = plain(file.attrs[name])
                raise BadData(f"{path}: bad checkpoint attributes (no network has {name} {value})")
    return state


def read_probe(path: str) -> list[dict[str, Any]]:
    """Read a probe file as one dictionary a row."""
    return _read_table(path, "probe", PROBE_DTYPE)


def read_precisions(path: str) -> list[dict[str, Any]]:
    """Read a finetune file as one dictionary a class."""
    return _read_table(path, "finetune", PRECISION_DTYPE)


def _read_table(path: str, kind: str, dtype: np.dtype) -> list[dict[str, Any]]:
    with open_file(path, kind) as (file, _):
        table = array(path, file, "results", (None,), "V")
    names = table.dtype.names or ()
    missing = [name for name in dtype.names or () if name not in names]
    if missing:
        raise BadData(f"{path}: dataset 'results' lacks columns {', '.join(missing)}")
    return [dict(zip(names, (plain(value) for value in row), strict=True)) for row in table]
