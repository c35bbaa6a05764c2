"""Score matrices to be labelled, from our logits files or from anybody's arrays.

N rows (images), K columns (clusters), T heads, D features. Rows are read in blocks, so
that a matrix may be larger than memory; what lies in a file by the row, uncompressed, is read
past the library that wrote it. Compressed .npz is read whole.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import h5py
import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from sela_cli import envelope, formats
from sela_cli.devices import sent
from sela_cli.errors import BadData, NoInput, SelaError
from sela_cli.keys import RowNumbers, dataset_id
from sela_cli.stored import Stored
from sela_cli.tiles import CPU

_MAGIC = {b"\x89HDF": "hdf5", b"\x93NUM": "npy", b"PK\x03\x04": "npz"}
_SUFFIXES = {
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
}
# Other files that hold a matrix: what is imported, and what reads it.
_FOREIGN = {
    ".csv": ("numpy", "numpy.loadtxt({!r}, delimiter=',')"),
    ".tsv": ("numpy", "numpy.loadtxt({!r})"),
    ".txt": ("numpy", "numpy.loadtxt({!r})"),
    ".parquet": ("numpy, pandas", "pandas.read_parquet({!r}).to_numpy()"),
    ".pt": ("numpy, torch", "torch.load({!r}).numpy()"),
    ".pth": ("numpy, torch", "torch.load({!r}).numpy()"),
}
# Where a zip's local header says how long its last two parts are.
_ZIP_LENGTHS = 26
_TENSORS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# Room for decoded chunks of an HDF5 dataset, and for so many rows of them at most, but for one
# row at least; the slots of its hash table for each.
_CACHE_BYTES, _CACHED_ROWS = 64 << 20, 4
_SLOTS_A_CHUNK = 100
# Of features that are being kept, at a time.
_BLOCK_VALUES = 1 << 23
# Rows that are read along with each that is wanted, in storage that has no quick way to it;
# and how many values at a time.
_BETWEEN, _BETWEEN_VALUES = 12, 1 << 21

Which = slice | np.ndarray


class Tally:
    """Bytes that have been read; several threads add to it."""

    def __init__(self) -> None:
        self._bytes, self._lock = 0, Lock()

    def add(self, count: int) -> None:
        """Count so many more."""
        with self._lock:
            self._bytes += count

    def take(self) -> int:
        """How many there were since this was last asked."""
        with self._lock:
            count, self._bytes = self._bytes, 0
        return count


class Matrix:
    """N x K scores of one head, read by a slice or an ascending array of rows.

    `resident`: bytes of them that are in memory in any case.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        load: Callable[[Which], np.ndarray],
        name: str,
        resident: int = 0,
    ) -> None:
        self.shape, self.name, self.tally = shape, name, Tally()
        self.resident = resident
        self._load = load

    def read(self, rows: Which) -> np.ndarray:
        """The named rows, as they are stored."""
        block_nK = self._load(rows)
        self.tally.add(block_nK.nbytes)
        return block_nK

    def tensor(self, rows: Which, device: torch.device = CPU) -> Tensor:
        """The named rows as a tensor, which a device is sent as they are stored."""
        block_nK = self.read(rows)
        block_nK = np.ascontiguousarray(block_nK, block_nK.dtype.newbyteorder("="))
        return sent(torch.from_numpy(block_nK), device)


class Features:
    """N x D features that the scores of several heads are made of.

    They are read again whenever they are asked for, until they are kept.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.kept_ND: Tensor | None = None

    def keep(self, device: torch.device = CPU) -> None:
        """Read them all, once, into memory or that of a device."""
        count, width = self.shape
        step = max(1, _BLOCK_VALUES // width)
        for start in range(0, count, step):
            block_nD = self.matrix.tensor(slice(start, start + step), device)
            if self.kept_ND is None:
                dtype = torch.float16 if block_nD.dtype == torch.float16 else torch.float32
                self.kept_ND = torch.empty(count, width, dtype=dtype, device=device)
            self.kept_ND[start : start + step] = block_nD

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.matrix.shape

    @property
    def size(self) -> int:
        """Bytes of one value when kept."""
        return 2 if self.matrix.read(slice(0)).dtype == np.float16 else 4

    def tensor(self, rows: Which, device: torch.device) -> Tensor:
        """The named rows, float32."""
        if self.kept_ND is None:
            return self.matrix.tensor(rows, device).float()
        chosen = rows if isinstance(rows, slice) else torch.from_numpy(rows)
        return self.kept_ND[chosen].to(device, torch.float32)


class Product(Matrix):
    """Scores of one head as features times weights, worked out whenever they are read."""

    def __init__(self, features: Features, weight_KD: np.ndarray, bias_K: np.ndarray, name: str):
        super().__init__((features.shape[0], len(bias_K)), self.read, name)
        self.features, self.tally = features, features.matrix.tally
        self.weight_KD, self.bias_K = torch.from_numpy(weight_KD), torch.from_numpy(bias_K)
        # Copied once: a GPU would wait for them in every tile.
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def read(self, rows: Which) -> np.ndarray:
        """The named rows, float32."""
        return self.tensor(rows).numpy()

    def tensor(self, rows: Which, device: torch.device = CPU) -> Tensor:
        """The named rows, float32."""
        block_nD = self.features.tensor(rows, device)
        if device not in self._placed:
            self._placed[device] = self.bias_K.to(device), self.weight_KD.to(device)
        bias_K, weight_KD = self._placed[device]
        # By torch, which keeps to the calling thread; NumPy's BLAS would start more.
        return torch.addmm(bias_K, block_nD, weight_KD.T)


@dataclass(frozen=True)
class Scores:
    """What a file offers to be labelled: its heads, and who its rows are."""

    heads: list[Matrix]
    keys: Sequence[str]
    index_N: np.ndarray
    header: envelope.Header | None
    features: Features | None = None

    @property
    def dataset_id(self) -> str:
        """Hash of the ordered row keys."""
        return self.header.dataset_id if self.header else dataset_id(self.keys)

    def side_by_side(self) -> Matrix:
        """The scores of all heads as one matrix, (N, sum of K); features are read once."""
        products = [matrix for matrix in self.heads if isinstance(matrix, Product)]
        if products and self.features:
            weight_SD = torch.cat([product.weight_KD for product in products]).numpy()
            bias_S = torch.cat([product.bias_K for product in products]).numpy()
            return Product(self.features, weight_SD, bias_S, "features x heads")

        def read(rows: Which) -> np.ndarray:
            return np.concatenate([matrix.read(rows) for matrix in self.heads], axis=1)

        return Matrix(
            (len(self.keys), sum(matrix.shape[1] for matrix in self.heads)), read, "logits"
        )


@contextmanager
def open_scores(spec: str) -> Iterator[Scores]:
    """Open `FILE`, `FILE::NAME` or `-` (standard input): HDF5, .npy, .npz or safetensors.

    `NAME` is a dataset or array of the file; without it our logits files give all their
    heads, other files their only 2-D array. Raises NoInput and BadData.
    """
    path, _, name = spec.partition("::")
    with ExitStack() as stack:
        actual = path
        if path == "-":
            actual = envelope.spool(sys.stdin.buffer)
            stack.callback(os.unlink, actual)
        if not os.path.exists(actual):
            raise NoInput(f"{path}: no such file")
        if not os.path.isdir(actual) and not os.path.isfile(actual):
            raise BadData(f"{path} is no regular file", "give '-' to read from a pipe")
        if os.path.isdir(actual):
            raise BadData(
                f"{path} is a folder; labelling needs a matrix", "sela embed --data makes one"
            )
        openers = {
            "hdf5": _open_hdf5,
            "npy": _open_npy,
            "npz": _open_npz,
            "safetensors": _open_safetensors,
        }
        yield openers[_kind_of(actual, path)](stack, path, actual, name)


def _kind_of(path: str, shown: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            magic = stream.read(4)
    except PermissionError as error:
        raise NoInput(f"{shown}: permission denied", f"chmod u+r {shlex.quote(shown)}") from error
    if not magic:
        raise BadData(f"{shown} is empty")
    suffix = os.path.splitext(shown)[1].lower()
    # A torch.save is a zip, as .npz is.
    if suffix in _FOREIGN and _MAGIC.get(magic) in (None, "npz"):
        modules, array = _FOREIGN[suffix]
        code = f"import {modules}; numpy.save('scores.npy', {array.format(shown)})"
        raise BadData(
            f"{shown}: not HDF5, .npy, .npz or safetensors",
            f"convert it: python -c {_quoted(code)}",
        )
    return _MAGIC.get(magic) or _SUFFIXES.get(suffix, "safetensors")


def _quoted(code: str) -> str:
    """Python as one word of a shell: most has single quotes, which are easier read in double."""
    return shlex.quote(code) if set(code) & set('"\\$`!') else f'"{code}"'


def _open_hdf5(stack: ExitStack, path: str, actual: str, name: str) -> Scores:
    file = stack.enter_context(envelope.open_hdf5(actual, path))
    with envelope.damage_named(path):
        return _scores_of_hdf5(stack, path, file, name)


def _scores_of_hdf5(stack: ExitStack, path: str, file: h5py.File, name: str) -> Scores:
    if not envelope.is_ours(file):
        name = name or _only_matrix(path, file)
        matrix = _of_dataset(stack, path, file, name)
        keys = envelope.keys_beside(file[name.lstrip("/")])
        if keys and not isinstance(keys, RowNumbers) and len(set(keys)) < len(keys):
            raise BadData(f"{path}: the 'keys' beside '{name}' name a row twice", "mend them")
        return _anonymous(matrix, keys)
    header = envelope.read_header_of(path, file)
    if header.kind != "logits":
        raise BadData(f"{path} holds {header.kind}, but logits are needed here")
    keys, index_N = formats.read_images(path, file)
    features = None
    if name:
        heads = [_of_dataset(stack, path, file, name)]
    elif "features" in file:
        heads, features = _factored(stack, path, file)
        if not heads:
            raise BadData(f"{path}: group 'heads' is missing, which goes with 'features'")
    else:
        count = len(file.get("logits", ()))
        heads = [_of_dataset(stack, path, file, f"logits/{number}") for number in range(count)]
    if not heads:
        raise BadData(f"{path}: neither 'logits/0' nor 'features' is there")
    for head in heads:
        if head.shape[0] != len(keys):
            raise BadData(
                f"{path}: dataset '{head.name}' has {head.shape[0]} rows for {len(keys)} keys"
            )
    return Scores(heads, keys, index_N, header, features)


def _only_matrix(path: str, file: h5py.File) -> str:
    found: list[str] = []

    def collect(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 2 and item.dtype.kind in "fiu":
            found.append(name)

    file.visititems(collect)
    return _only(path, found)


def _only(path: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if not names:
        raise BadData(f"{path}: there is no 2-D array of numbers in it")
    # Without `--` it would be taken for options.
    last = "at the end of the line: -- " if path == "-" else ""
    raise BadData(
        f"{path} holds several arrays ({', '.join(names[:5])})",
        f"name one: {last}{shlex.quote(f'{path}::{names[0]}')}",
    )


def _of_dataset(stack: ExitStack, path: str, file: h5py.File, name: str) -> Matrix:
    item = envelope.dataset(path, file, name.lstrip("/"), (None, None), "fiu", by_rows=True)
    # Contiguous data is read past HDF5, at three times the speed and from many threads.
    offset = item.id.get_offset() if item.chunks is None and item.size else None
    if offset is not None and item.dtype.isnative:
        # A link may lead to another file.
        stored = Stored(item.file.filename, item.dtype, item.shape, offset, path)
        return _of_stored(stack, stored, item.name)
    resident = 0
    if item.chunks:
        item, resident = _caching(item)

    matrix: Matrix

    def read(rows: Which) -> np.ndarray:
        if isinstance(rows, slice) or not _dense(rows):
            with envelope.damage_named(path):
                return np.asarray(item[rows])
        # HDF5 looks up rows one by one: all that lie between are soon read.
        between = int(rows[-1] - rows[0]) + 1
        if between * item.shape[1] > _BETWEEN_VALUES and len(rows) > 1:
            halves = np.array_split(rows, 2)
            return np.concatenate([read(half) for half in halves])
        with envelope.damage_named(path):
            block_nK = np.asarray(item[rows[0] : rows[-1] + 1])
        matrix.tally.add((between - len(rows)) * block_nK[:1].nbytes)
        return block_nK[rows - rows[0]]

    matrix = Matrix(item.shape, read, item.name, resident)
    return matrix


def _caching(item: h5py.Dataset) -> tuple[h5py.Dataset, int]:
    """The same with room for the chunks that several threads' rows lie in, which are decoded
    anew for every tile otherwise: a tile is a small part of a chunk. And what that room, and
    one more chunk, take, where it is much."""
    across = math.ceil(item.shape[1] / item.chunks[1])
    chunk = math.prod(item.chunks) * item.dtype.itemsize
    row = chunk * across
    if row > _CACHE_BYTES and not item.id.get_create_plist().get_nfilters():
        # Nothing is decoded: parts of chunks are read from where they lie.
        return item, 0
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    rows = min(_CACHED_ROWS, max(_CACHE_BYTES // row, 1))
    access.set_chunk_cache(_SLOTS_A_CHUNK * rows * across, rows * row, 0.75)
    file, name = item.file, item.name.encode()
    # What is open already keeps the cache that it has.
    item.id.close()
    resident = row + chunk if row > _CACHE_BYTES else 0
    return h5py.Dataset(h5py.h5d.open(file.id, name, access)), resident


def _dense(rows: np.ndarray) -> bool:
    """Whether ascending row numbers are so many of those between the first and the last."""
    return len(rows) > 0 and int(rows[-1] - rows[0]) < _BETWEEN * len(rows)


def _factored(stack: ExitStack, path: str, file: h5py.File) -> tuple[list[Matrix], Features]:
    features = Features(_of_dataset(stack, path, file, "features"))
    width = features.matrix.shape[1]
    heads: list[Matrix] = []
    for number in range(len(file.get("heads", ()))):
        weight_KD = envelope.dataset(path, file, f"heads/{number}/weight", (None, width))[()]
        bias_K = envelope.dataset(path, file, f"heads/{number}/bias", (len(weight_KD),))[()]
        # Other programs write float64.
        weight_KD, bias_K = weight_KD.astype(np.float32), bias_K.astype(np.float32)
        heads.append(Product(features, weight_KD, bias_K, f"features x heads/{number}"))
    return heads, features


def _open_npy(stack: ExitStack, path: str, actual: str, name: str) -> Scores:
    if name:
        raise BadData(f"{path} is a .npy: its array has no name, so not '{name}'", f"give {path}")
    try:
        array = np.load(actual, mmap_mode="r", allow_pickle=False)
    except SelaError:
        raise
    except Exception as error:  # The header is Python text: damage shows in many ways.
        raise BadData(f"{path}: not a readable .npy array ({error})") from error
    if isinstance(array, np.ndarray) and array.ndim == 2:
        declared = max(array.nbytes, *array.shape)
        envelope.check_expansion(path, "array", declared, os.path.getsize(actual))
    scores = _of_array(path, array, "array")
    if isinstance(array, np.memmap) and array.flags.c_contiguous and array.size:
        stored = Stored(actual, array.dtype, array.shape, array.offset, path)
        scores.heads[0] = _of_stored(stack, stored, "array")
    return scores


def _of_stored(stack: ExitStack, stored: Stored, name: str) -> Matrix:
    stack.enter_context(stored.file)
    rows, clusters = stored.shape
    matrix = Matrix((rows, clusters), stored.read, name)
    stored.unwanted = matrix.tally.add
    return matrix


def _open_npz(stack: ExitStack, path: str, actual: str, name: str) -> Scores:
    try:
        archive = stack.enter_context(np.load(actual, allow_pickle=False))
        for entry in archive.zip.infolist():
            envelope.check_expansion(path, entry.filename, entry.file_size, entry.compress_size)
        name = name or _only(path, _matrices(archive.zip))
        if name not in archive.files:
            raise BadData(
                f"{path}: there is no array '{name}'", f"it holds {', '.join(archive.files)}"
            )
        stored = _uncompressed(archive, actual, name, path)
        if stored:
            return _anonymous(_of_stored(stack, stored, name))
        array = archive[name]
    except SelaError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have errors of their own.
        raise BadData(f"{path}: not a readable .npz archive ({error})") from error
    return _of_array(path, array, name)


def _open_safetensors(stack: ExitStack, path: str, actual: str, name: str) -> Scores:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = stack.enter_context(safe_open(actual, framework="np"))
        names = list(tensors.keys())
        name = name or _only(
            path, [each for each in names if len(tensors.get_slice(each).get_shape()) == 2]
        )
        if name not in names:
            raise BadData(f"{path}: there is no tensor '{name}'")
        stored = _of_tensor(tensors.get_slice(name), actual, name, path)
        if stored:
            return _anonymous(_of_stored(stack, stored, name))
        try:
            array = tensors.get_tensor(name)
            known = array.dtype.isbuiltin == 1
        except (TypeError, AttributeError):
            known = False
        if not known:
            # NumPy has no bfloat16 and no float8, or has them of another package.
            tensors = stack.enter_context(safe_open(actual, framework="pt"))
            array = tensors.get_tensor(name).float().numpy()
    except (SafetensorError, OSError) as error:
        raise BadData(f"{path}: not HDF5, .npy, .npz or safetensors ({error})") from error
    return _of_array(path, array, name)


def _matrices(archive: zipfile.ZipFile) -> list[str]:
    """Names of the 2-D arrays of numbers: no more than their headers is read."""
    found: list[str] = []
    for name in archive.namelist():
        if name.endswith(".npy"):
            with archive.open(name) as stream:
                shape, _, dtype = _header_of(stream)
            if len(shape) == 2 and envelope.usable(dtype, "fiu"):
                found.append(name.removesuffix(".npy"))
    return found


def _header_of(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape of the .npy that begins here, whether it is transposed, and its dtype."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    # The third version differs from the second in names of columns alone.
    return np.lib.format.read_array_header_2_0(stream)


def _uncompressed(archive: NpzFile, actual: str, name: str, shown: str) -> Stored | None:
    """A matrix of an archive as it lies there; none where that is not by the row."""
    assert archive.zip is not None
    entry = archive.zip.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with Path(actual).open("rb") as stream:
        # The local header ends with a name and a field that are as long as it says.
        stream.seek(entry.header_offset + _ZIP_LENGTHS)
        stream.seek(sum(struct.unpack("<HH", stream.read(4))), os.SEEK_CUR)
        shape, transposed, dtype = _header_of(stream)
        offset = stream.tell()
    fits = 0 < math.prod(shape) * dtype.itemsize <= entry.file_size
    if transposed or len(shape) != 2 or not envelope.usable(dtype, "fiu") or not fits:
        return None
    return Stored(actual, dtype, shape, offset, shown)


def _of_tensor(item: Any, actual: str, name: str, shown: str) -> Stored | None:
    """A tensor as it lies in its file; none where it is no matrix of floats."""
    dtype, shape = _TENSORS.get(item.get_dtype()), tuple(item.get_shape())
    if dtype is None or len(shape) != 2 or not math.prod(shape):
        return None
    with Path(actual).open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        begin, _ = json.loads(stream.read(length))[name]["data_offsets"]
    return Stored(actual, np.dtype(dtype), shape, 8 + length + begin, shown)


def _of_array(path: str, array: np.ndarray, name: str) -> Scores:
    if not isinstance(array, np.ndarray):
        raise BadData(f"{path}: '{name}' is not an array")
    if not envelope.usable(array.dtype, "fiu"):
        raise BadData(
            f"{path}: '{name}' has dtype {array.dtype}, scores are numbers of at most 64 bits"
        )
    if array.ndim != 2:
        raise BadData(f"{path}: '{name}' has shape {array.shape}, scores are N x K")
    # Pages of a mapping count as the process's memory; one by the row is not read by its mapping.
    return _anonymous(Matrix(array.shape, lambda rows: np.asarray(array[rows]), name, array.nbytes))


def _anonymous(matrix: Matrix, keys: Sequence[str] | None = None) -> Scores:
    rows = matrix.shape[0]
    return Scores([matrix], RowNumbers(rows) if keys is None else keys, np.arange(rows), None)
