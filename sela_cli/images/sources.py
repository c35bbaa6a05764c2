"""Where images come from: a SPEC becomes keys and a function that decodes one image.

Labels are never needed here; a source that happens to know classes offers them as `truth`.
"""

from __future__ import annotations

import lzma
import os
import shlex
import tarfile
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from sela_cli import envelope
from sela_cli.errors import BadData, NoInput, StoppedEarly, UsageError
from sela_cli.keys import some_of, text_of
from sela_cli.spread import spread
from sela_cli.stored import Stored

# Pictures by which collections with the same keys are told apart.
_COMPARED = 8
# HDF5's for the chunks of images, and a prime number of places in it.
_CACHE_BYTES, _CACHE_SLOTS = 64 << 20, 100_003
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp"}
    | {".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
# Pictures that are not read, the raw ones of cameras among them: told, not passed over.
_UNREAD = frozenset(
    {".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".psd", ".pbm", ".pnm"}
    | {".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"}
)
# So are links that are called like images.
_LINKS_ASTRAY = "links to no file"
# Of these Pillow may give grey of 16 bits as if it had 32.
_SIXTEEN_BITS = ("PNG", "PPM")
# Pillow knows more, some of which start other programs: EPS calls Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_HDF5_SUFFIXES = (".h5", ".hdf5")
_LIST_SUFFIXES = (".txt", ".lst", ".tsv")


@dataclass(frozen=True)
class Source:
    """Images by number. `decode(i)` gives height x width x 3, uint8, of any size.

    `reduced(i, side)`, where there is one, is quicker, and of a large image decodes only
    as much as is needed for edges of at least `side`. `pixels` are all images as they lie
    in a file, (N, 3, S, S), where the source is that. `unread` counts, by their endings, the
    pictures beside these that no image comes of.
    """

    spec: str
    keys: Sequence[str]
    decode: Callable[[int], np.ndarray]
    truth_N: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    reduced: Callable[[int, int], np.ndarray] | None = None
    pixels: Stored | None = None
    unread: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, rows: np.ndarray) -> Source:
        """Some of the images, in the given order."""
        reduced = self.reduced
        return replace(
            self,
            keys=some_of(self.keys, rows),
            decode=lambda number: self.decode(int(rows[number])),
            truth_N=None if self.truth_N is None else self.truth_N[rows],
            reduced=reduced and (lambda number, side: reduced(int(rows[number]), side)),
            pixels=None,
        )

    def is_like(self, other: Source) -> bool:
        """Whether the other's images are the same, by all keys and some of the pictures, or of
        other sizes by their keys: a packed file has them resized."""
        if self.keys != other.keys:
            return False
        some = spread(len(self), _COMPARED).tolist()
        pairs = ((self.image(row), other.image(row)) for row in some)
        return all(one.shape != two.shape or np.array_equal(one, two) for one, two in pairs)

    def image(self, number: int, side: int = 0) -> np.ndarray:
        """One image, or (`side`) perhaps a reduced one; BadData naming its key otherwise."""
        try:
            if side and self.reduced:
                return self.reduced(number, side)
            return self.decode(number)
        except (StoppedEarly, NoInput):
            # A signal may come in the middle of a picture, and a disk may fail.
            raise
        except Exception as error:  # A decoder of a damaged file may raise anything.
            reason, mend = str(error), "repair it"
            if isinstance(error, BadData):
                reason, mend = error.args[0], error.mend or mend
            raise BadData(
                f"{self.spec}: image '{self.keys[number]}' can't be read ({reason})",
                f"{mend}, or leave it out with --skip-bad where a command has that",
            ) from error


def open_source(spec: str, download: bool = False) -> Source:
    """The images that `spec` names; see `sela embed --help` for its forms.

    Raises NoInput where nothing is there, BadData where it holds no image.
    """
    # Large pictures are read; far larger ones are refused.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    # What Pillow makes the best of is no picture's name, and nobody's to mend.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    source = _open(spec, download)
    if not len(source):
        raise BadData(f"{spec}: no image in it", f"known endings: {' '.join(sorted(SUFFIXES))}")
    if len(set(source.keys)) != len(source):
        twice = next(key for key, count in Counter(source.keys).items() if count > 1)
        told = f"{spec}: '{twice}' is named twice; every image needs a key of its own"
        mend = "a list names an image a line, then a tab and a class; classes alone go into a .npy"
        raise BadData(told, mend if _is_list(spec) else "")
    return source


def is_folder(spec: str) -> bool:
    """Whether `spec` names a folder, whose images are all below it."""
    return spec != "digits" and os.path.isdir(spec)


def _is_list(spec: str) -> bool:
    return spec.lower().endswith(_LIST_SUFFIXES) and os.path.isfile(spec)


def no_classes(spec: str, keys: Sequence[str], otherwise: str = "") -> BadData:
    """What to raise where classes are needed and the images have none.

    `keys` are those of all its images; `otherwise` ends the advice.
    """
    told = f"{spec} has no true classes"
    mend = "use a folder with one subfolder a class, or a list with a class a line, after a tab"
    names, loose = _folder_classes(keys)
    if names and loose and (os.path.isdir(spec) or spec.lower().endswith(_TAR_SUFFIXES)):
        told += f": '{loose[0]}' lies in no class's subfolder"
        mend = "move or remove it" if len(loose) == 1 else f"move or remove the {len(loose)} such"
    elif _is_list(spec):
        listed, classes = _lines(spec)
        if "" in classes and any(classes):
            first, count = listed[classes.index("")], classes.count("")
            told += f": {count} of {len(listed)} lines have none, first '{first}'"
            mend = "end every line with a tab and a class"
    elif h5py.is_hdf5(spec.partition("::")[0]):
        mend = "name it in a dataset 'labels' beside the images: (N,) of integers or text"
    return BadData(told, mend + otherwise)


def _open(spec: str, download: bool) -> Source:
    if spec == "digits":
        return _digits()
    name, colon, root = spec.partition(":")
    if colon and name in _TORCHVISION:
        return _torchvision(spec, name, root, download)
    path, _, inner = spec.partition("::")
    if not os.path.exists(path):
        known = "digits, a folder, a tar, a text list, an HDF5 file, " + ", ".join(
            f"{name}:ROOT" for name in _TORCHVISION
        )
        raise NoInput(f"{spec}: no such file or folder", f"--data takes {known}")
    if os.path.isdir(path):
        return _folder(spec)
    lower = path.lower()
    if lower.endswith(_TAR_SUFFIXES):
        return _tar(spec)
    if lower.endswith(_HDF5_SUFFIXES):
        return _hdf5(spec, path, inner)
    if lower.endswith(_LIST_SUFFIXES):
        return _list(spec)
    # `sela pack` writes to whatever name it is given.
    if os.access(path, os.R_OK) and h5py.is_hdf5(path):
        return _hdf5(spec, path, inner)
    raise BadData(
        f"{spec}: not a folder, tar, HDF5 file or text list ({', '.join(_LIST_SUFFIXES)})"
    )


def _rgb(file: Any, side: int = 0) -> np.ndarray:
    from PIL import Image

    try:
        opened = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        # Pillow goes on to speak of an attack.
        raise BadData(str(error).partition(", could be")[0], "make it smaller") from error
    with opened as image:
        if side:
            # A JPEG of 3000 x 2250 for 256 pixels: 8 ms instead of 38; nothing for small ones.
            image.draft("RGB", (side, side))
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
            # 16 bits, of which Pillow's own conversion cuts at 255 instead of scaling.
            grey = np.round(np.asarray(image) / 257).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode in ("I", "F"):
            # Of no known range: 0..1, 0..255 or any other.
            raise ValueError("grey of 32 bits or floats: convert it to 8 or 16 bits")
        return np.asarray(image.convert("RGB"))


def _rgb_file(path: Path, side: int = 0) -> np.ndarray:
    if not path.is_file():
        if path.exists():
            raise OSError("not a regular file")
        if Path(str(path).rsplit(maxsplit=1)[0]).is_file():
            raise BadData(
                "there is such a file without the last word", "write a tab before a class"
            )
    return _rgb(path, side)


def _classes_of(names: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    # Not np.unique, which makes every name as long as the longest.
    classes = sorted(set(names))
    numbers = dict(zip(classes, range(len(classes)), strict=True))
    return np.array([numbers[name] for name in names], np.int64), tuple(classes)


def _with_folder_classes(source: Source) -> Source:
    names, loose = _folder_classes(source.keys)
    if loose or not names:
        return source
    truth_N, classes = _classes_of(names)
    return replace(source, truth_N=truth_N, classes=classes)


def _folder_classes(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The first folder of each key below those that all share, and the keys without one."""
    parts = [PurePosixPath(key).parts for key in keys]
    depth = 0
    while parts and all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    loose = [key for key, p in zip(keys, parts, strict=True) if len(p) <= depth + 1]
    return [p[depth] for p in parts if len(p) > depth + 1], loose


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Sixteen grey levels, spread over 0..255.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Source(
        "digits",
        [f"digits/{number:04d}" for number in range(len(images))],
        lambda number: np.repeat(images[number][:, :, None], 3, axis=2),
        bunch.target.astype(np.int64),
        tuple(str(name) for name in bunch.target_names),
    )


def _folder(spec: str) -> Source:
    unread: Counter[str] = Counter()
    keys = sorted(_names(spec, unread))
    return _with_folder_classes(replace(_files(spec, Path(spec), keys), unread=unread))


def _ending(path: str) -> str:
    """In small letters; '' of the notes that macOS lays beside files, which end as these do."""
    *folders, name = path.split("/")
    if name.startswith("._") or "__MACOSX" in folders:
        return ""
    return os.path.splitext(name)[1].lower()


def _names(folder: str, unread: Counter[str]) -> Iterator[str]:
    """Image files below a folder, as paths from there; linked folders are not followed.

    Pictures that are none of these are counted in `unread`.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, prefix)) as entries:
                for entry in entries:
                    path = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{path}/")
                        continue
                    ending = _ending(path)
                    if ending in _UNREAD:
                        unread[ending] += 1
                    elif ending in SUFFIXES:
                        # Of a pipe or a device the end may never come.
                        if entry.is_file():
                            yield path
                        elif entry.is_symlink():
                            unread[_LINKS_ASTRAY] += 1
        except OSError as error:
            raise NoInput(f"{error.filename}: {error.strerror}", "make it readable") from error


def _files(spec: str, root: Path, keys: list[str]) -> Source:
    return Source(
        spec,
        keys,
        lambda number: _rgb_file(root / keys[number]),
        reduced=lambda number, side: _rgb_file(root / keys[number], side),
    )


def _list(spec: str) -> Source:
    keys, names = _lines(spec)
    source = _files(spec, Path(spec).parent, keys)
    if keys and all(names):
        truth_N, classes = _classes_of(names)
        return replace(source, truth_N=truth_N, classes=classes)
    return source


def _lines(spec: str) -> tuple[list[str], list[str]]:
    """A path a line, relative to the list; a tab and a class may follow, else it is ''."""
    try:
        # Some editors begin a file with a byte order mark.
        text = Path(spec).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise NoInput(f"{spec}: {error.strerror}") from error
    # Not splitlines, which also ends lines at characters that names may have.
    lines = [line for line in text.split("\n") if line.strip() and line[0] != "#"]
    entries = [[part.strip() for part in f"{line}\t".split("\t")[:2]] for line in lines]
    return [key for key, _ in entries], [name for _, name in entries]


def _tar(spec: str) -> Source:
    """Members are read where they lie and never extracted."""
    try:
        with tarfile.open(spec, tarinfo=_Member) as archive:
            entries = list(_bounded(spec, archive))
            by_path = {os.path.normpath(entry.name): entry for entry in entries}
            # What was appended under a name counts, as when tar extracts.
            images: dict[str, tarfile.TarInfo] = {}
            unread: Counter[str] = Counter()
            for entry in entries:
                ending = _ending(entry.name)
                if ending in _UNREAD:
                    unread[ending] += 1
                elif ending in SUFFIXES:
                    if member := _linked_file(entry, by_path):
                        images[PurePosixPath(entry.name).as_posix()] = member
                    elif entry.issym() or entry.islnk():
                        unread[_LINKS_ASTRAY] += 1
            # tarfile takes a damaged header for the end; a real end is a block of zeros.
            stream: Any = archive.fileobj
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
            keys = sorted(images)
            members = [images[key] for key in keys]
            # Only an uncompressed tar can be read at random; others are held as they are, encoded.
            plain = isinstance(archive.fileobj, BufferedReader)
            # Once, however many links lead to it, and as they lie there: to go back is to
            # decompress from the beginning.
            once = sorted(set(members), key=lambda member: member.offset_data)
            held = {} if plain else {member: _member_bytes(archive, member) for member in once}
    except PermissionError as error:
        raise NoInput(f"{spec}: permission denied", f"chmod u+r {shlex.quote(spec)}") from error
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        MemoryError,
        lzma.LZMAError,
        zlib.error,
    ) as error:
        raise BadData(f"{spec}: not a readable tar ({_first_line(error)})") from error
    handle = Path(spec).open("rb") if plain else None  # noqa: SIM115 (open as long as the source)
    lock = threading.Lock()

    def decode(number: int, side: int = 0) -> np.ndarray:
        if handle is None:
            return _rgb(BytesIO(held[members[number]]), side)
        with lock:
            handle.seek(members[number].offset_data)
            data = handle.read(members[number].size)
        return _rgb(BytesIO(data), side)

    return _with_folder_classes(Source(spec, keys, decode, reduced=decode, unread=unread))


# Links in a row, as Linux follows them; they may lead in a circle.
_LINKS = 40
# A path, and what else an honest archive says of a file.
_HEADER_BYTES = 1 << 20
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class _Member(tarfile.TarInfo):
    """Refuses long headers: tarfile reads them whole, and compressed they may be tiny."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > _HEADER_BYTES:
            raise ValueError(f"a header claims {member.size:.1e} bytes")
        return member


def _bounded(spec: str, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, each before what it claims is unpacked."""
    stored = os.path.getsize(spec)
    for member in archive:
        envelope.check_expansion(spec, member.name, archive.offset, stored)
        yield member


def _linked_file(
    entry: tarfile.TarInfo | None, by_path: dict[str, tarfile.TarInfo]
) -> tarfile.TarInfo | None:
    """The file that an entry is or, by links within the tar, leads to."""
    for _ in range(_LINKS):
        if entry is None or not (entry.issym() or entry.islnk()):
            break
        # Only a symbolic link's path begins where the link lies.
        folder = os.path.dirname(entry.name) if entry.issym() else ""
        entry = by_path.get(os.path.normpath(os.path.join(folder, entry.linkname)))
    return entry if entry and entry.isfile() and not entry.issparse() else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def _hdf5(spec: str, path: str, inner: str) -> Source:
    """uint8 (N, H, W, 3), (N, 3, H, W) or (N, H, W); `keys` and `labels` (N,) beside them count.

    `labels`, also (N, 1), are integers or text, or numbers of the names in `classes`.
    """
    with envelope.open_hdf5(path) as file, envelope.damage_named(path):
        names = [inner.lstrip("/")] if inner else _image_datasets(file)
        if len(names) != 1:
            raise BadData(
                f"{spec}: {len(names)} datasets could be images ({', '.join(names[:5])})",
                f"name one: {shlex.quote(path)}::DATASET"
                if names
                else "they are uint8 of shape (N, H, W, 3), (N, 3, H, W) or (N, H, W)",
            )
        if not _could_be_images(file.get(names[0])):
            raise BadData(f"{spec}: dataset '{names[0]}' is not uint8 images")
        rank = file[names[0]].ndim
        shape = envelope.dataset(path, file, names[0], (None,) * rank, "u").shape
        keys = envelope.keys_beside(file[names[0]]) or [
            f"{names[0]}/{number:07d}" for number in range(shape[0])
        ]
        beside = file[names[0]].parent
        truth_N: np.ndarray | None = None
        classes: tuple[str, ...] = ()
        if _are_classes(beside.get("labels"), shape[0]):
            truth_N, classes = _hdf5_classes(spec, path, beside)
        item = file[names[0]]
        offset = item.id.get_offset() if item.chunks is None else None
        # A link may lead to another file.
        lies_in = item.file.filename
    stored = None if offset is None else Stored(lies_in, np.dtype(np.uint8), shape, offset, path)
    # An image may lie in a part of each of hundreds of chunks: all of these are to have room.
    cache = {"rdcc_nbytes": _CACHE_BYTES, "rdcc_nslots": _CACHE_SLOTS}
    chunked: Any = h5py.File(path, "r", **cache)[names[0]] if stored is None else None
    lock = threading.Lock()

    def decode(number: int) -> np.ndarray:
        if stored is not None:
            image = stored.read(np.array([number]))[0]
        else:
            with lock:
                image = np.asarray(chunked[number])
        if image.ndim == 2:
            return np.repeat(image[:, :, None], 3, axis=2)
        return image if shape[-1] == 3 else image.transpose(1, 2, 0)

    square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3]
    return Source(spec, keys, decode, truth_N, classes, pixels=stored if square else None)


def _hdf5_classes(spec: str, path: str, group: h5py.Group) -> tuple[np.ndarray, tuple[str, ...]]:
    labels_N = group["labels"][()].reshape(-1)
    if "classes" not in group:
        values, truth_N = np.unique(labels_N, return_inverse=True)
        return truth_N, tuple(
            text_of(value) if isinstance(value, bytes) else str(value) for value in values
        )
    names_C = envelope.dataset(path, group, "classes", (None,), "SO")[()]
    names = tuple(text_of(name) for name in names_C)
    numbers = labels_N.dtype.kind in "iu"
    if not numbers or ((labels_N < 0) | (labels_N >= len(names))).any():
        raise BadData(f"{spec}: dataset 'labels' does not number the {len(names)} 'classes'")
    return labels_N.astype(np.int64), names


def _are_classes(item: Any, rows: int) -> bool:
    shaped = isinstance(item, h5py.Dataset) and item.shape in ((rows,), (rows, 1))
    return shaped and item.dtype.kind in "iuSO"


def _could_be_images(item: Any) -> bool:
    return (
        isinstance(item, h5py.Dataset)
        and item.dtype == np.uint8
        and (item.ndim == 3 or (item.ndim == 4 and 3 in (item.shape[1], item.shape[3])))
    )


def _image_datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if _could_be_images(item) else None)
    return names


# Name -> (torchvision class, keyword of the split, its default, the values it takes).
_TORCHVISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cifar10": ("CIFAR10", "train", {"train": True, "test": False}),
    "cifar100": ("CIFAR100", "train", {"train": True, "test": False}),
    "mnist": ("MNIST", "train", {"train": True, "test": False}),
    "fashion-mnist": ("FashionMNIST", "train", {"train": True, "test": False}),
    "svhn": ("SVHN", "split", {"train": "train", "test": "test", "extra": "extra"}),
    "stl10": (
        "STL10",
        "split",
        {"train": "train", "test": "test", "unlabeled": "unlabeled", "all": "train+unlabeled"},
    ),
    "voc2007": (
        "VOCDetection",
        "image_set",
        {"trainval": "trainval", "train": "train", "val": "val", "test": "test"},
    ),
    "imagenet": ("ImageNet", "split", {"train": "train", "val": "val"}),
    "places365": ("Places365", "split", {"train": "train-standard", "val": "val"}),
}


def _torchvision(spec: str, name: str, root: str, download: bool) -> Source:
    """`name:ROOT`, or `name:ROOT@SPLIT`; the first split of the table is the default."""
    from torchvision import datasets

    class_name, keyword, splits = _TORCHVISION[name]
    base, at, split = root.rpartition("@")
    if not at or split not in splits:
        base, split = root, next(iter(splits))
        if at and os.sep not in root.rpartition("@")[2] and not os.path.exists(root):
            raise UsageError(f"{spec}: split is one of {', '.join(splits)}")
    options = {keyword: splits[split]}
    if name == "voc2007":
        options["year"] = "2007"
    if name != "imagenet":
        options["download"] = download
    if name == "places365":
        # The 256-pixel copies: networks see 224 of them.
        options["small"] = True
    try:
        data = getattr(datasets, class_name)(base, **options)
    except (RuntimeError, OSError, ValueError) as error:
        # torchvision advises an option of its own.
        reason = str(error).splitlines()[0].partition(". You can use")[0]
        mend = "" if download or name == "imagenet" else "--download fetches it"
        raise NoInput(f"{spec}: {reason}", mend) from error
    if name == "imagenet":
        keys = [Path(path).relative_to(data.root).as_posix() for path, _ in data.samples]
    elif name == "places365":
        keys = [Path(path).relative_to(data.images_dir).as_posix() for path, _ in data.imgs]
    elif name == "voc2007":
        keys = [f"{split}/{Path(path).name}" for path in data.images]
    else:
        # Numbers alone would take labels of one set for those of another.
        keys = [f"{name}/{split}/{number:06d}" for number in range(len(data))]
    # VOC's targets are annotation files: an image there has several classes.
    labels = None if name == "voc2007" else getattr(data, "targets", getattr(data, "labels", None))
    truth_N = None if labels is None else np.asarray(labels, dtype=np.int64)
    if truth_N is not None and (truth_N < 0).any():
        truth_N = None
    # ImageNet's have several names each.
    classes = tuple(
        ", ".join(c) if isinstance(c, tuple) else str(c) for c in getattr(data, "classes", ())
    )
    return Source(
        spec, keys, lambda number: np.asarray(data[number][0].convert("RGB")), truth_N, classes
    )
