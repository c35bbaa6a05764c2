"""The HDF5 files: constants, checked reading, atomic writing. docs/schema.md is the contract.

N images, K clusters, T heads, D features.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sela_cli import __version__, interrupt, job
from sela_cli.errors import BadData, CannotCreate, NoInput, StoppedEarly, UsageError
from sela_cli.locks import locked
from sela_cli.watchdog import survives

FORMAT = "HDF5::SeLa"
VERSION = 1
KINDS = ("logits", "labels", "checkpoint", "probe", "finetune", "images")
ENVELOPE = (
    "format",
    "kind",
    "format-version",
    "generated-by",
    "creation-date",
    "parameters",
    "history",
    "inputs",
    "dataset-id",
    "digest",
)
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
# What it took to come by a result is not the result: left out of the digest.
COSTS = ("seconds", "bytes-read")
_CHUNK_BYTES = 1 << 24


def unsolved(assign: str) -> dict[str, Any]:
    """Attributes of labels that no solve made: what belongs to one is NaN."""
    nothing: dict[str, Any] = dict.fromkeys(LABEL_ATTRIBUTES, float("nan"))
    nothing |= {"assign": assign, "n-iters": 0, "converged": True}
    return nothing | {"status": "unsolved", "bytes-read": 0}


@dataclass(frozen=True)
class Provenance:
    """How a file came to be: the command, its resolved options, and what it read."""

    command: str
    parameters: Mapping[str, Any]
    inputs: Sequence[Mapping[str, str]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    dataset_id: str = ""

    def reading(self, role: str, header: Header) -> Provenance:
        """The same provenance with one more input and that input's history."""
        inputs = [*self.inputs, {"role": role, "path": header.path, "digest": header.digest}]
        history = list(self.history)
        history += [entry for entry in header.history if entry not in history]
        return replace(self, inputs=inputs, history=history)

    def reading_foreign(self, role: str, path: str) -> Provenance:
        """The same provenance with one more input, which has no digest of ours."""
        return replace(self, inputs=[*self.inputs, {"role": role, "path": path, "digest": ""}])

    def of(self, dataset_id: str) -> Provenance:
        """The same provenance for these images."""
        return replace(self, dataset_id=dataset_id)


@dataclass(frozen=True)
class Header:
    """The root attributes of a file that was read."""

    path: str
    kind: str
    digest: str
    dataset_id: str
    parameters: dict[str, Any]
    history: list[dict[str, Any]]
    inputs: list[dict[str, str]]
    generated_by: str
    creation_date: str


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

    keys: list[str]
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


# ---- identity ---------------------------------------------------------------


def dataset_id(keys: Sequence[str]) -> str:
    """Hash of the ordered image keys."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(_key_bytes(key) + b"\0")
    return "sha256:" + digest.hexdigest()


def payload_digest(file: h5py.File) -> str:
    """Hash of the results in a file: all of it but provenance and costs."""
    digest = hashlib.sha256()

    def add_attributes(name: str, item: h5py.Group | h5py.Dataset) -> None:
        for key in sorted(item.attrs):
            if not (name == "" and key in ENVELOPE) and key not in COSTS:
                text = json.dumps(_plain(item.attrs[key]))
                digest.update(f"{name}@{key}\0{text}".encode())

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if name.rsplit("/", 1)[-1] in COSTS:
            return
        add_attributes(name, item)
        if isinstance(item, h5py.Dataset):
            digest.update(f"{name}\0{item.dtype.str}\0{json.dumps(item.shape)}\0".encode())
            for block in _blocks(item):
                digest.update(np.ascontiguousarray(block).tobytes())

    add_attributes("", file)
    file.visititems(add)
    return "sha256:" + digest.hexdigest()


def _blocks(dataset: h5py.Dataset) -> Iterator[np.ndarray]:
    if dataset.ndim == 0:
        yield np.asarray(dataset[()])
        return
    row_bytes = max(1, dataset.dtype.itemsize * math.prod(dataset.shape[1:]))
    rows = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, dataset.shape[0], rows):
        yield dataset[start : start + rows]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def through_json(value: Any) -> Any:
    """What is read back of a value written to a JSON attribute."""
    return json.loads(json.dumps(value))


def _key_bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


# ---- writing ----------------------------------------------------------------


def same_file(path: str, other: str) -> bool:
    """Whether both name one file, there or not."""
    return os.path.realpath(path) == os.path.realpath(other)


def check_output(path: str, force: bool, *inputs: str | None) -> None:
    """Refuse, before any work is done, an output that could not be written.

    Raises CannotCreate where it exists and `force` is off, or its folder is missing;
    UsageError where it is one of the `inputs` (FILE or FILE::NAME).
    """
    if path == "-":
        return
    if any(each and same_file(path, each.partition("::")[0]) for each in inputs):
        raise UsageError(f"{path} would take the place of what is read", "name another output")
    target = Path(path)
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device or a pipe"
        raise CannotCreate(f"{path} is {kind}", "name a file, or - for standard output")
    if target.exists() and not force:
        raise CannotCreate(f"{path} exists", "add --force to replace it")
    if not target.parent.is_dir():
        raise CannotCreate(f"{path}: no such folder", f"mkdir -p {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise CannotCreate(f"{path}: its folder is read-only", "choose another --output")


@contextmanager
def replacing(path: str, force: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all: yields where to write, then moves it to `path`.

    `-` sends it to standard output instead. Raises CannotCreate, also where another
    process is writing that file.
    """
    check_output(path, force)
    try:
        with _written_to_stdout() if path == "-" else _written_beside(path) as partial:
            yield partial
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CannotCreate(f"{path}: {_reason(error)}", "free space, or write elsewhere") from error


@contextmanager
def _written_beside(path: str) -> Iterator[Path]:
    # Of a link, the file that it leads to is replaced.
    target = Path(path).resolve()
    partial, lock = _beside(target)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError:
            raise CannotCreate(
                f"{path}: another process is writing it", "wait for it, or choose another name"
            ) from None
        stack.callback(partial.unlink, missing_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, target)
        _sync(target.parent)


def _beside(target: Path) -> tuple[Path, Path]:
    """Where a file is written before it has its name, and the lock that is held meanwhile."""
    # One name for all processes: what a killed one left behind, the next one overwrites.
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.lock")


def discard(path: Path) -> None:
    """Remove a file, and what a process that was killed while writing it left behind."""
    partial, lock = _beside(path)
    # Where another process is writing it, it is that one's.
    with suppress(BlockingIOError), locked(lock):
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


@contextmanager
def _written_to_stdout() -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix="sela-stdout-")
    os.close(handle)
    try:
        yield Path(name)
        with Path(name).open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def create(
    path: str,
    kind: str,
    provenance: Provenance,
    force: bool = False,
    part: Part | None = None,
) -> Iterator[h5py.File]:
    """Write one of our files, with its provenance and digest, whole or not at all.

    With a `part`, StoppedEarly in the block leaves what is written as `path`.unfinished,
    and the next call whose part has the same identity is given that to go on with.
    """
    assert kind in KINDS
    created = _now()
    with replacing(path, force) as partial:
        beside = Path(f"{Path(path).resolve()}.unfinished") if part and path != "-" else None
        goes_on = part is not None and beside is not None and _taken_up(part, beside, partial)
        try:
            with (
                _Output(partial, "r+" if goes_on else "w+") as stream,
                h5py.File(stream, "r+" if goes_on else "w") as file,
            ):
                yield file
                for name in _PART_ATTRIBUTES:
                    file.attrs.pop(name, None)
                _seal(file, kind, provenance, created)
        except StoppedEarly:
            if part is not None and beside is not None:
                _leave(part, partial, beside)
            raise
        _tried.add(_identity(str(partial)))
        if beside is not None:
            beside.unlink(missing_ok=True)


@dataclass
class Part:
    """The `done` rows that are written of a file; `identity` says what all rows depend on."""

    identity: str
    done: int = 0


_PART_ATTRIBUTES = ("identity", "done")


def _taken_up(part: Part, beside: Path, partial: Path) -> bool:
    if not beside.exists():
        return False
    with removable(beside), open_hdf5(str(beside)) as file, damage_named(str(beside)):
        # Another command's state has no identity of this form.
        if file.attrs.get("identity") != part.identity:
            return False
        part.done = int(file.attrs["done"])
    os.replace(beside, partial)
    return True


@contextmanager
def removable(path: Path) -> Iterator[None]:
    """BadData in this block, which reads what stopped work left, is mended by removing that."""
    try:
        yield
    except BadData as error:
        raise BadData(error.args[0], f"rm {path}") from error


def _leave(part: Part, partial: Path, beside: Path) -> None:
    with h5py.File(partial, "r+") as file:
        file.attrs.update(identity=part.identity, done=part.done)
    _sync(partial)
    os.replace(partial, beside)


class _Output(io.FileIO):
    """What libhdf5 writes into. The first failure is told, what follows goes nowhere.

    By itself libhdf5 can't close a file that the disk has no room for: it tries again at
    exit, and complains there beside the error that was told.
    """

    _failed = False

    def write(self, data: Any) -> int:
        if not self._failed:
            self._failed = True
            view = memoryview(data).cast("B")
            while view:
                view = view[super().write(view) :]
            self._failed = False
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def truncate(self, size: int | None = None) -> int:
        return 0 if self._failed else super().truncate(size)


def _seal(file: h5py.File, kind: str, provenance: Provenance, created: str) -> None:
    digest = payload_digest(file)
    own = {"command": provenance.command, "parameters": dict(provenance.parameters)}
    history = [*provenance.history, {**own, "digest": digest}]
    file.attrs.update(
        {
            "format": FORMAT,
            "kind": kind,
            "format-version": VERSION,
            "generated-by": f"sela-{__version__}",
            "creation-date": created,
            "parameters": json.dumps(dict(provenance.parameters)),
            "history": json.dumps(history[-_HISTORY_ENTRIES:]),
            "inputs": json.dumps([dict(entry) for entry in provenance.inputs]),
            "dataset-id": provenance.dataset_id,
            "digest": digest,
        }
    )


# A long run has thousands of ancestors: its files would be mostly history.
_HISTORY_ENTRIES = 16


def _now() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"SOURCE_DATE_EPOCH={epoch} is no number of seconds since 1970") from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error).splitlines()[0]


def _write_images(file: h5py.File, keys: Sequence[str], index_N: np.ndarray) -> None:
    file["index"] = np.asarray(index_N, dtype=np.int64)
    _write_texts(file, "keys", keys)


def _write_texts(file: h5py.File, name: str, texts: Sequence[str]) -> None:
    encoded = np.array([_key_bytes(text) for text in texts])
    utf8 = h5py.string_dtype("utf-8", encoded.dtype.itemsize)
    file.create_dataset(name, data=encoded.astype(utf8))


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
        file["labels"] = np.stack([head.labels_N for head in labels.heads]).astype(np.int32)
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


# ---- reading ----------------------------------------------------------------


def spool(stream: Any) -> str:
    """Copy a pipe into a temporary file, since HDF5 has to seek. Returns its path.

    Raises StoppedEarly after a signal, CannotCreate where the file has no room, UsageError
    in a job of several processes.
    """
    if job.launched():
        # torchrun hands its own on: each of them would get some of it.
        raise UsageError("several processes can't share standard input", "write it to a file first")
    handle, name = tempfile.mkstemp(prefix="sela-stdin-")
    try:
        with _Output(handle, "w") as copy, interrupt.waiting():
            shutil.copyfileobj(stream, copy)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, InterruptedError):
            raise StoppedEarly("stopped while reading standard input", "run it again") from None
        if isinstance(error, OSError):
            raise CannotCreate(f"{name}: {_reason(error)}", "free space, or set TMPDIR") from error
        raise
    return name


# Processor time that the structure of any file may take.
_LEAST_SECONDS = 2.0
# Files that this process has written or tried: a fork beside torch takes some 30 ms.
_tried: set[tuple[int, ...]] = set()


def _identity(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def open_hdf5(path: str, shown: str = "") -> Iterator[h5py.File]:
    """Open any HDF5 file for reading; errors name it `shown`.

    Raises NoInput where it is missing or in use, BadData where it is damaged or something
    else.
    """
    shown = shown or path
    if not os.path.exists(path):
        raise NoInput(f"{shown}: no such file")
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise BadData(f"{shown} is {kind}, not an HDF5 file")
    # Some damage sends libhdf5 into an endless loop that nothing in this process can end.
    identity = _identity(path)
    # A thousand datasets, half a megabyte at least, take a tenth of a second.
    seconds = min(_LEAST_SECONDS + os.path.getsize(path) / 1e6, 60)
    if identity not in _tried and not survives(lambda: _walk(path), seconds):
        raise BadData(f"{shown}: damaged, libhdf5 does not come back from it", "write it again")
    _tried.add(identity)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if error.errno == errno.EACCES:
            raise NoInput(f"{shown}: permission denied", f"chmod u+r {shown}") from error
        if error.errno == errno.EAGAIN:
            raise NoInput(f"{shown}: another process is writing it", "wait for it") from error
        if _is_numpy(path):
            raise BadData(
                f"{shown} is a NumPy array, and a file that sela wrote is needed here",
                "sela label takes arrays as scores",
            ) from error
        raise _damaged(shown, error) from error
    with file:
        yield file


def _walk(path: str) -> None:
    """Read whatever libhdf5 has to follow addresses for: all but the numbers of datasets."""

    def visit(item: h5py.Group | h5py.Dataset) -> None:
        for name in item.attrs:
            item.attrs[name]
        if isinstance(item, h5py.Dataset) and item.dtype.hasobject:
            for _ in _blocks(item):
                pass
        elif isinstance(item, h5py.Dataset) and item.chunks:
            item.id.get_num_chunks()

    with h5py.File(path, "r") as file:
        visit(file)
        file.visititems(lambda name, item: visit(item))


def _is_numpy(path: str) -> bool:
    with Path(path).open("rb") as stream:
        return stream.read(6) == b"\x93NUMPY"


def _damaged(path: str, error: Exception) -> BadData:
    problem = "truncated" if "truncated" in str(error) else "damaged or not HDF5"
    return BadData(f"{path}: {problem}", "write it again")


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What HDF5 raises in this block, which does nothing but read `path`, is BadData."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise _damaged(path, error) from error


@contextmanager
def open_file(path: str, *kinds: str) -> Iterator[tuple[h5py.File, Header]]:
    """Open one of our files (`-`: standard input) of one of `kinds` (any, if none is given).

    Raises NoInput and BadData, the latter also where reading it inside the block fails.
    """
    actual = spool(sys.stdin.buffer) if path == "-" else path
    try:
        with open_hdf5(actual, path) as file:
            with damage_named(path):
                header = read_header_of(path, file)
            if kinds and header.kind not in kinds:
                wanted = " or ".join(kinds)
                raise BadData(f"{path} holds {header.kind}, but {wanted} is needed here")
            with damage_named(path):
                yield file, header
    finally:
        if path == "-":
            os.unlink(actual)


def is_ours(file: h5py.File) -> bool:
    """Whether an open HDF5 file was written by sela."""
    return bool(file.attrs.get("format") == FORMAT)


def read_header_of(path: str, file: h5py.File) -> Header:
    """The root attributes of an open file, which errors call `path`."""
    if not is_ours(file):
        raise BadData(f"{path} is HDF5 but not a sela file (attribute 'format' is missing)")
    try:
        version = int(file.attrs["format-version"])
        if version > VERSION:
            raise BadData(
                f"{path} has format-version {version}, this release reads up to {VERSION}",
                f"it was written by {file.attrs['generated-by']}: pip install -U sela",
            )
        text = {name: str(file.attrs[name]) for name in ENVELOPE if name != "format-version"}
        header = Header(
            path=path,
            kind=text["kind"],
            digest=text["digest"],
            dataset_id=text["dataset-id"],
            parameters=_json(text["parameters"], dict),
            history=_json(text["history"], list),
            inputs=_json(text["inputs"], list),
            generated_by=text["generated-by"],
            creation_date=text["creation-date"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise BadData(f"{path}: bad root attributes ({error})") from error
    if header.kind not in KINDS:
        raise BadData(f"{path}: unknown kind {header.kind!r}")
    return header


def _json(text: str, kind: type) -> Any:
    value = json.loads(text)
    if not isinstance(value, kind):
        raise TypeError(f"{text[:40]} is no {kind.__name__}")
    return value


def _datasets(path: str, file: h5py.File, group: str) -> dict[str, np.ndarray]:
    """Every dataset of a group. Raises BadData where it is something else."""
    items = file.get(group)
    if not isinstance(items, h5py.Group):
        raise BadData(f"{path}: group '{group}' is missing")
    for name, item in items.items():
        if not isinstance(item, h5py.Dataset):
            raise BadData(f"{path}: '{group}/{name}' is not a dataset")
        if not usable(item.dtype, "fiu"):
            raise BadData(f"{path}: '{group}/{name}' has dtype {item.dtype}, not numbers for torch")
        _check_size(path, item)
    return {name: item[()] for name, item in items.items()}


def dataset(
    path: str, file: h5py.File, name: str, shape: Sequence[int | None], kinds: str = "f"
) -> h5py.Dataset:
    """The named dataset, checked: its rank, its fixed extents, its dtype's kind (NumPy's letter).

    Raises BadData naming file and dataset.
    """
    item = file.get(name)
    if not isinstance(item, h5py.Dataset):
        raise BadData(f"{path}: dataset '{name}' is missing")
    if not usable(item.dtype, kinds):
        raise BadData(f"{path}: dataset '{name}' has dtype {item.dtype}, which can't be used here")
    fits = len(shape) == item.ndim and all(
        want is None or want == have for want, have in zip(shape, item.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if extent is None else extent for extent in shape)
        raise BadData(f"{path}: dataset '{name}' has shape {item.shape}, not {wanted}")
    _check_size(path, item)
    return item


def usable(dtype: np.dtype, kinds: str) -> bool:
    """Whether values are of these kinds (NumPy's letters), and torch has numbers of that size."""
    return dtype.kind in kinds and (dtype.kind not in "fiu" or dtype.itemsize <= 8)


# Honest data may be compressed a hundredfold; a bomb is by many thousands.
_EXPANSION = 100
_SMALL_BYTES = 1 << 26


def check_expansion(path: str, name: str, declared: int, stored: int) -> None:
    """Refuse `declared` bytes (or rows) that are said to lie in `stored` bytes of a file.

    A shape is a few bytes, and may claim any amount of memory. Raises BadData.
    """
    if declared > _SMALL_BYTES + _EXPANSION * stored:
        raise BadData(f"{path}: '{name}' claims {declared:.1e} bytes and has {stored}")


def _check_size(path: str, item: h5py.Dataset) -> None:
    if item.shape is None:
        raise BadData(f"{path}: dataset '{item.name}' is empty")
    stored = os.path.getsize(item.file.filename)
    if item.is_virtual:
        folder = Path(item.file.filename).parent
        sources = {folder / source.file_name for source in item.virtual_sources()}
        stored += sum(source.stat().st_size for source in sources if source.is_file())
    check_expansion(path, item.name, max(item.nbytes, *item.shape, 0), stored)
    offset = item.id.get_offset() if item.chunks is None else None
    if offset is not None and item.size and offset + item.nbytes > stored:
        raise BadData(f"{path}: dataset '{item.name}' goes beyond the end of the file")


def _array(
    path: str, file: h5py.File, name: str, shape: Sequence[int | None], kinds: str
) -> np.ndarray:
    return np.asarray(dataset(path, file, name, shape, kinds)[()])


def read_header(path: str) -> Header:
    """The root attributes alone."""
    with open_file(path) as (_, header):
        return header


def describe(path: str) -> dict[str, Any]:
    """What `sela info` shows: the header, then every dataset and payload attribute."""
    with open_file(path) as (file, header):
        datasets: dict[str, str] = {}
        attributes = {
            name: _plain(value) for name, value in file.attrs.items() if name not in ENVELOPE
        }

        def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                datasets[name] = f"{item.shape} {item.dtype}"
            for key, value in item.attrs.items():
                attributes[f"{name}@{key}"] = _plain(value)

        file.visititems(add)
    return {
        "file": path,
        "kind": header.kind,
        "digest": header.digest,
        "dataset-id": header.dataset_id,
        "generated-by": header.generated_by,
        "creation-date": header.creation_date,
        "command": header.history[-1]["command"] if header.history else "",
        "parameters": header.parameters,
        "inputs": header.inputs,
        "datasets": datasets,
        "attributes": attributes,
    }


def read_images(path: str, file: h5py.File) -> tuple[list[str], np.ndarray]:
    """The keys and index that `logits` and `labels` name their rows with."""
    raw = dataset(path, file, "keys", (None,), "SO")[()]
    keys = [bytes(key).decode("utf-8", "surrogateescape") for key in raw]
    return keys, _array(path, file, "index", (len(keys),), "iu")


def read_labels(path: str) -> Labels:
    """Read a labels file. Raises BadData where a part is missing or does not fit."""
    with open_file(path, "labels") as (file, header):
        keys, index_N = read_images(path, file)
        labels_TN = _array(path, file, "labels", (None, len(keys)), "iu")
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
                    attributes={name: _plain(potentials.attrs[name]) for name in known},
                    trace=_datasets(path, file, trace) if trace in file else {},
                )
            )
        if not heads:
            raise BadData(f"{path}: dataset 'labels' has no head")
        return Labels(keys, index_N, heads, header)


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint file. Raises BadData where a part is missing."""
    with open_file(path, "checkpoint") as (file, header):
        model, optimizer = _datasets(path, file, "model"), _datasets(path, file, "optimizer")
        try:
            return Checkpoint(
                model=model,
                optimizer=optimizer,
                arch=str(file.attrs["arch"]),
                image_size=int(file.attrs["image-size"]),
                heads=[int(clusters) for clusters in json.loads(file.attrs["heads"])],
                step=int(file.attrs["step"]),
                epoch=float(file.attrs["epoch"]),
                recipe=json.loads(file.attrs["recipe"]),
                labels_digest=str(file.attrs["labels-digest"]),
                losses=_array(path, file, "losses", (None,), "f"),
                header=header,
            )
        except (KeyError, ValueError, TypeError) as error:
            raise BadData(f"{path}: bad checkpoint attributes ({error})") from error


def read_probe(path: str) -> list[dict[str, Any]]:
    """Read a probe file as one dictionary a row."""
    return _read_table(path, "probe", PROBE_DTYPE)


def read_precisions(path: str) -> list[dict[str, Any]]:
    """Read a finetune file as one dictionary a class."""
    return _read_table(path, "finetune", PRECISION_DTYPE)


def _read_table(path: str, kind: str, dtype: np.dtype) -> list[dict[str, Any]]:
    with open_file(path, kind) as (file, _):
        table = _array(path, file, "results", (None,), "V")
    names = table.dtype.names or ()
    missing = [name for name in dtype.names or () if name not in names]
    if missing:
        raise BadData(f"{path}: dataset 'results' lacks columns {', '.join(missing)}")
    rows = [dict(zip(names, (_plain(value) for value in row), strict=True)) for row in table]
    return [{k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()} for row in rows]
