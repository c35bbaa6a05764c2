"""What every file of ours has: a header with its provenance and a digest of what it holds.

Checked opening, of foreign HDF5 too, and creating; docs/schema.md is the contract. N images.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakSet

import h5py
import numpy as np

from sela_cli import __version__, interrupt, job
from sela_cli.errors import BadData, CannotCreate, NoInput, SelaError, StoppedEarly, UsageError
from sela_cli.keys import named, text_of
from sela_cli.outputs import reason, removable, replacing, synced
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
# What it took to come by a result is not the result: left out of the digest.
COSTS = ("seconds", "bytes-read")
_CHUNK_BYTES = 1 << 24


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


def payload_digest(file: h5py.File) -> str:
    """Hash of the results in a file: all of it but provenance and costs."""
    digest = hashlib.sha256()

    def add_attributes(name: str, item: h5py.Group | h5py.Dataset) -> None:
        for key in sorted(item.attrs):
            if not (name == "" and key in ENVELOPE) and key not in COSTS:
                text = json.dumps(plain(item.attrs[key]))
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


def plain(value: Any) -> Any:
    """A value of an HDF5 attribute as Python's own."""
    if isinstance(value, bytes):
        # A string of fixed length, as C, MATLAB and R write them.
        return text_of(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def through_json(value: Any) -> Any:
    """What is read back of a value written to a JSON attribute."""
    return json.loads(json.dumps(value))


def leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of nested settings, without the names of what these are in."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield name, value


def keys_beside(item: h5py.Dataset) -> Sequence[str] | None:
    """What anybody's file calls the rows of a dataset: `keys` (N,) in the same group.

    Raises BadData where that names another number of rows.
    """
    keys = item.parent.get("keys")
    if not isinstance(keys, h5py.Dataset) or keys.ndim != 1 or keys.dtype.kind not in "SOiu":
        return None
    if len(keys) != len(item):
        raise BadData(
            f"{item.file.filename}: '{keys.name}' names {len(keys)} rows, '{item.name}' has "
            f"{len(item)}",
            "rename it, or give it a name a row",
        )
    return named(keys[()]) if keys.dtype.kind in "SO" else list(map(str, keys[()].tolist()))


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
    beside = _beside(path)
    with replacing(path, force) as partial:
        goes_on = part is not None and _taken_up(part, path, partial)
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
    # Until the file has its name, this is all that there is of the work.
    if beside is not None:
        beside.unlink(missing_ok=True)


@dataclass
class Part:
    """The `done` rows that are written of a file; `identity` says what all rows depend on."""

    identity: str
    done: int = 0


_PART_ATTRIBUTES = ("identity", "done")


def _beside(path: str) -> Path | None:
    return None if path == "-" else Path(f"{Path(path).resolve()}.unfinished")


def part_at(path: str) -> Part | None:
    """What a stopped call has left of `path`."""
    beside = _beside(path)
    if beside is None or not beside.exists():
        return None
    with removable(beside), open_hdf5(str(beside)) as file, damage_named(str(beside)):
        # Another command's state has no identity of this form.
        if "identity" not in file.attrs:
            return None
        return Part(str(file.attrs["identity"]), int(file.attrs["done"]))


def _taken_up(part: Part, path: str, partial: Path) -> bool:
    left, beside = part_at(path), _beside(path)
    if left is None or beside is None or left.identity != part.identity:
        return False
    part.done = left.done
    os.replace(beside, partial)
    return True


def _leave(part: Part, partial: Path, beside: Path) -> None:
    with h5py.File(partial, "r+") as file:
        file.attrs.update(identity=part.identity, done=part.done)
    synced(partial)
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


_spooled: WeakSet[Any] = WeakSet()


def spool(stream: Any) -> str:
    """Copy a pipe into a temporary file, since HDF5 has to seek. Returns its path.

    Raises StoppedEarly after a signal, CannotCreate where the file has no room, UsageError
    in a job of several processes and where it has been read before.
    """
    if job.launched():
        # torchrun hands its own on: each of them would get some of it.
        raise UsageError("several processes can't share standard input", "write it to a file first")
    if stream in _spooled:
        raise UsageError("two inputs can't both be standard input", "write one to a file first")
    _spooled.add(stream)
    handle, name = tempfile.mkstemp(prefix="sela-stdin-")
    try:
        stopped = StoppedEarly("stopped while reading standard input", "run it again")
        with _Output(handle, "w") as copy, interrupt.raising(stopped):
            shutil.copyfileobj(stream, copy)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError):
            raise CannotCreate(f"{name}: {reason(error)}", "free space, or set TMPDIR") from error
        raise
    return name


# Processor time that the structure of any file may take.
_LEAST_SECONDS = 2.0
# Files that one fork tries.
_TOGETHER = 50
# Files that this process has written or tried: a fork beside torch takes some 30 ms.
_tried: set[tuple[int, ...]] = set()


def _identity(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _allowed(path: str) -> float:
    """A thousand datasets, half a megabyte at least, take a tenth of a second."""
    return min(_LEAST_SECONDS + os.path.getsize(path) / 1e6, 60)


def try_together(paths: Sequence[str]) -> None:
    """What opening each of many files would do first, a fork for some of them at a time; where
    one of these does not come back each is tried by itself when it is opened."""
    there = [path for path in paths if os.path.isfile(path)]
    for at in range(0, len(there), _TOGETHER):
        some = there[at : at + _TOGETHER]
        found = [_identity(path) for path in some]

        def walk(some: list[str] = some) -> None:
            for path in some:
                # What can be handled is, where the file is opened.
                with suppress(Exception):
                    _walk(path)

        if survives(walk, sum(map(_allowed, some))):
            _tried.update(found)


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
    if identity not in _tried and not survives(lambda: _walk(path), _allowed(path)):
        raise BadData(f"{shown}: damaged, libhdf5 does not come back from it", "write it again")
    _tried.add(identity)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if error.errno == errno.EACCES:
            raise NoInput(
                f"{shown}: permission denied", f"chmod u+r {shlex.quote(shown)}"
            ) from error
        if error.errno == errno.EAGAIN:
            raise NoInput(f"{shown}: another process is writing it", "wait for it") from error
        if error.errno not in _OF_THE_DISK and _is_numpy(path):
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


# Of a disk or a file server that fails: the file may be whole.
_OF_THE_DISK = (errno.EIO, errno.ESTALE)


def _damaged(path: str, error: Exception) -> SelaError:
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return NoInput(f"{path}: {reason(error)}")
    problem = "truncated" if "truncated" in str(error) else "damaged or not HDF5"
    return BadData(f"{path}: {problem}", "write it again")


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What HDF5 raises in this block, which does nothing but read `path`, is BadData.

    NoInput where the disk fails; too little memory is no fault of the file.
    """
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
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
    return bool(plain(file.attrs.get("format")) == FORMAT)


def read_header_of(path: str, file: h5py.File) -> Header:
    """The root attributes of an open file, which errors call `path`."""
    if not is_ours(file):
        raise BadData(f"{path} is HDF5 but not a sela file (attribute 'format' is missing)")
    try:
        version = int(file.attrs["format-version"])
        if version > VERSION:
            raise BadData(
                f"{path} has format-version {version}, this release reads up to {VERSION}",
                f"{plain(file.attrs['generated-by'])} wrote it: install that, or a newer one",
            )
        text = {name: str(plain(file.attrs[name])) for name in ENVELOPE if name != "format-version"}
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


def datasets(path: str, file: h5py.File, group: str) -> dict[str, np.ndarray]:
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
    path: str,
    file: h5py.Group,
    name: str,
    shape: Sequence[int | None],
    kinds: str = "f",
    by_rows: bool = False,
) -> h5py.Dataset:
    """The named dataset, checked: its rank, its fixed extents, its dtype's kind (NumPy's letter).

    `by_rows`: it may be compressed as well as gzip can, being padded or never read whole.
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
    _check_size(path, item, _MOST_EXPANSION if by_rows else _EXPANSION)
    _check_filters(path, item)
    return item


def _check_filters(path: str, item: h5py.Dataset) -> None:
    plist = item.id.get_create_plist()
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if h5py.h5z.filter_avail(code):
            continue
        try:
            # It may have been left out where it was not there to write with.
            item[(slice(1),) * item.ndim]
        except OSError as error:
            raise BadData(
                f"{path}: dataset '{item.name}' is compressed by filter {code} "
                f"({name.decode(errors='replace')}), which is not installed",
                f"where it was written: h5repack -f GZIP=4 {shlex.quote(path)} OTHER.h5",
            ) from error


def usable(dtype: np.dtype, kinds: str) -> bool:
    """Whether values are of these kinds (NumPy's letters), and torch has numbers of that size."""
    return dtype.kind in kinds and (dtype.kind not in "fiu" or dtype.itemsize <= 8)


# Honest data may be compressed a hundredfold, and nothing by gzip more than this; a bomb is by
# many thousands.
_EXPANSION, _MOST_EXPANSION = 100, 1040
_SMALL_BYTES = 1 << 26


def check_expansion(
    path: str, name: str, declared: int, stored: int, most: int = _EXPANSION
) -> None:
    """Refuse `declared` bytes (or rows) that are said to lie in `stored` bytes of a file.

    A shape is a few bytes, and may claim any amount of memory. Raises BadData.
    """
    if declared > _SMALL_BYTES + most * stored:
        raise BadData(
            f"{path}: '{name}' claims {declared:.1e} bytes and has {stored}",
            "if that is so, write it again uncompressed",
        )


def _check_size(path: str, item: h5py.Dataset, most: int = _EXPANSION) -> None:
    if item.shape is None:
        raise BadData(f"{path}: dataset '{item.name}' is empty")
    stored = os.path.getsize(item.file.filename)
    if item.is_virtual:
        folder = Path(item.file.filename).parent
        sources = {folder / source.file_name for source in item.virtual_sources()}
        stored += sum(source.stat().st_size for source in sources if source.is_file())
    check_expansion(path, item.name, max(item.nbytes, *item.shape, 0), stored, most)
    offset = item.id.get_offset() if item.chunks is None else None
    if offset is not None and item.size and offset + item.nbytes > stored:
        raise BadData(f"{path}: dataset '{item.name}' goes beyond the end of the file")


def array(
    path: str, file: h5py.File, name: str, shape: Sequence[int | None], kinds: str
) -> np.ndarray:
    """What `dataset` has, read."""
    return np.asarray(dataset(path, file, name, shape, kinds)[()])


def read_header(path: str) -> Header:
    """The root attributes alone."""
    with open_file(path) as (_, header):
        return header


def describe(
    path: str,
    more: Callable[[str, h5py.File, Header], Mapping[str, Any]] = lambda path, file, header: {},
) -> dict[str, Any]:
    """What `sela info` shows: the header, then every dataset and payload attribute.

    `more` is what else there is to tell of the open file: a pipe can't be opened again.
    """
    with open_file(path) as (file, header):
        shapes: dict[str, str] = {}
        attributes = {
            name: plain(value) for name, value in file.attrs.items() if name not in ENVELOPE
        }

        def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                shapes[name] = f"{item.shape} {item.dtype}"
            for key, value in item.attrs.items():
                attributes[f"{name}@{key}"] = plain(value)

        file.visititems(add)
        told = more(path, file, header)
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
        **told,
        "datasets": shapes,
        "attributes": attributes,
    }
