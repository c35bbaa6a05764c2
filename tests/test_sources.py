"""Every form of SPEC opens the same images; bad ones are named; squares are torchvision's."""

from __future__ import annotations

import errno
import io
import os
import signal
import struct
import tarfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, NoInput, UsageError
from sela_cli.images import batches, sources
from sela_cli.images.batches import Images, open_images, square, stored_side
from sela_cli.images.pack import pack_stage
from sela_cli.images.sources import Source, no_classes, open_source

NAMES = [f"{number:02d}.png" for number in range(5)]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
CLASSES = ["owl", "bee", "owl", "cat", "bee"]
TRUTH = [2, 0, 2, 1, 0]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


FILES = [png(pixels) for pixels in PIXELS]


def write_folder(root: Path, names: list[str] = NAMES, files: list[bytes] = FILES) -> str:
    for name, data in zip(names, files, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "notes.md").write_text("not an image")
    return str(root)


def write_tar(path: Path, names: list[str] = NAMES, files: list[bytes] = FILES) -> str:
    mode: Any = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
    with tarfile.open(path, mode[path.suffix]) as archive:
        # Backwards: the order of members must not matter.
        for name, data in reversed(list(zip(names, files, strict=True))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def renamed(path: str, name: str) -> str:
    return str(Path(path).rename(Path(path).with_name(name)))


def write_list(root: Path, lines: list[str]) -> str:
    write_folder(root)
    path = root / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_hdf5(path: Path, **arrays: np.ndarray) -> str:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return str(path)


def write_linked(root: Path) -> str:
    """A file with nothing of its own: the images lie in another one, at some offset."""
    (root / "parts").mkdir()
    write_hdf5(root / "parts/one.h5", other=PIXELS[:2], images=PIXELS, keys=in_bytes(NAMES))
    with h5py.File(root / "a.h5", "w") as file:
        file["images"] = h5py.ExternalLink("parts/one.h5", "/images")
    return str(root / "a.h5")


def in_bytes(names: list[str]) -> np.ndarray:
    return np.array([name.encode() for name in names])


FORMS: dict[str, Callable[[Path], str]] = {
    "folder": lambda root: write_folder(root / "pictures"),
    "list": lambda root: write_list(root, NAMES),
    "commented list": lambda root: write_list(root, ["# a comment", *NAMES[:2], "", *NAMES[2:]]),
    "list with a mark": lambda root: write_list(root, ["\ufeff" + NAMES[0], *NAMES[1:]]),
    "tar": lambda root: write_tar(root / "a.tar"),
    "tar.gz called tar": lambda root: renamed(write_tar(root / "a.tar.gz"), "a.tar"),
    "tar called tgz": lambda root: renamed(write_tar(root / "a.tar"), "a.tgz"),
    "tar.gz": lambda root: write_tar(root / "a.tar.gz"),
    "tgz": lambda root: write_tar(root / "a.tgz"),
    "tar.bz2": lambda root: write_tar(root / "a.tar.bz2"),
    "tar.xz": lambda root: write_tar(root / "a.tar.xz"),
    "HDF5 NHWC": lambda root: write_hdf5(root / "a.h5", images=PIXELS, keys=in_bytes(NAMES)),
    "HDF5 NCHW": lambda root: write_hdf5(
        root / "a.hdf5", images=PIXELS.transpose(0, 3, 1, 2), keys=in_bytes(NAMES)
    ),
    "HDF5 behind a link": lambda root: write_linked(root) + "::/images",
    "HDF5 named": lambda root: (
        write_hdf5(root / "a.h5", x=PIXELS, other=255 - PIXELS, keys=in_bytes(NAMES)) + "::/x"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form: str, tmp_path: Path) -> None:
    source = open_source(FORMS[form](tmp_path))
    assert source.keys == NAMES
    assert source.truth_N is None
    np.testing.assert_array_equal([source.image(number) for number in range(5)], PIXELS)


FOLDED = {
    "flat": [f"{label}/{name}" for label, name in zip(CLASSES, NAMES, strict=True)],
    "below train": [f"train/{label}/{name}" for label, name in zip(CLASSES, NAMES, strict=True)],
    "above images": [f"{label}/images/{name}" for label, name in zip(CLASSES, NAMES, strict=True)],
}


@pytest.mark.parametrize("write", [write_folder, write_tar])
@pytest.mark.parametrize("form", FOLDED)
def test_subfolders_are_classes(form: str, write: Callable[..., str], tmp_path: Path) -> None:
    names = FOLDED[form]
    source = open_source(write(tmp_path / "a.tar", names))
    assert source.keys == sorted(names)
    assert source.classes == ("bee", "cat", "owl")
    assert source.truth_N is not None
    by_key = dict(zip(source.keys, source.truth_N.tolist(), strict=True))
    assert [by_key[name] for name in names] == TRUTH
    for number, key in enumerate(source.keys):
        np.testing.assert_array_equal(source.image(number), PIXELS[names.index(key)])


@pytest.mark.parametrize(
    "names",
    [["one/" + name for name in NAMES], ["a/x.png", "a/y.png", "b/x.png", "b/y.png", "stray.png"]],
)
def test_no_classes_without_several_folders_for_all(names: list[str], tmp_path: Path) -> None:
    assert open_source(write_folder(tmp_path, names)).truth_N is None


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_the_image_that_lies_in_no_class_is_named(
    write: Callable[..., str], tmp_path: Path
) -> None:
    """Below the folders that all share; a list is not mended by moving files."""
    names = ["p/c0/a.png", "p/c0/b.png", "p/c1/c.png", "p/c2/d.png", "p/loose.png"]
    spec = write(tmp_path / "a.tar", names)
    assert "'p/loose.png' lies in no" in str(no_classes(spec, open_source(spec).keys))
    for others in (write_list(tmp_path / "list", names), "photos.h5"):
        assert "with a class a line" in str(no_classes(others, names))
    assert "one subfolder a class" in str(no_classes(spec, ["p/a.png", "p/b.png"]))


def test_the_line_that_has_no_class_is_named(tmp_path: Path) -> None:
    """With a tab or without one."""
    lines = [f"{NAMES[0]}\towl", f"{NAMES[1]}\tbee\tmore", f"{NAMES[2]}\t", NAMES[3]]
    for count in (3, 4):
        spec = write_list(tmp_path, lines[:count])
        source = open_source(spec)
        assert source.keys == NAMES[:count] and source.truth_N is None
        told = str(no_classes(spec, source.keys))
        assert f"{count - 2} of {count} lines have none, first '02.png'" in told


def test_list_may_carry_classes(tmp_path: Path) -> None:
    lines = [f"{name}\t{label}" for name, label in zip(NAMES, CLASSES, strict=True)]
    source = open_source(write_list(tmp_path, ["# path, class", *lines]))
    assert source.keys == NAMES and source.classes == ("bee", "cat", "owl")
    assert source.truth_N is not None and source.truth_N.tolist() == TRUTH


def test_list_ends_lines_at_line_ends_only(tmp_path: Path) -> None:
    """Not at characters that are line ends elsewhere; and at those of Windows."""
    (tmp_path / "list.txt").write_bytes("a\x85b.jpg\r\nc\u2028d.jpg\r\n".encode())
    assert open_source(str(tmp_path / "list.txt")).keys == ["a\x85b.jpg", "c\u2028d.jpg"]


def test_list_with_some_classes_has_none(tmp_path: Path) -> None:
    source = open_source(write_list(tmp_path, [*NAMES[:4], f"{NAMES[4]}\tbee"]))
    assert source.keys == NAMES and source.truth_N is None


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_grey_hdf5_without_keys_but_labels(shape: tuple[int, ...], tmp_path: Path) -> None:
    grey, labels = PIXELS[..., 0], np.array(TRUTH).reshape(shape)
    source = open_source(write_hdf5(tmp_path / "a.h5", images=grey, labels=labels))
    np.testing.assert_array_equal(source.image(3), np.stack([grey[3]] * 3, axis=2))
    assert source.truth_N is not None and source.truth_N.tolist() == TRUTH
    assert len(set(source.keys)) == 5 and source.keys == sorted(source.keys)


@pytest.mark.parametrize("kind", ["S", "O"])
def test_hdf5_classes_are_the_words_of_its_labels(kind: str, tmp_path: Path) -> None:
    """Of fixed and of variable length: the classes that a folder of these names has."""
    words = np.array([label.replace("owl", "eulé").encode() for label in CLASSES], kind)
    data = words if kind == "S" else words.astype(h5py.string_dtype())
    source = open_source(write_hdf5(tmp_path / "a.h5", images=PIXELS, labels=data))
    assert source.classes == ("bee", "cat", "eulé")
    assert source.truth_N is not None and source.truth_N.tolist() == TRUTH


def test_hdf5_labels_are_those_beside_the_images(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", labels=np.array(TRUTH)[::-1])
    with h5py.File(path, "r+") as file:
        file["train/images"], file["test/images"] = PIXELS, PIXELS
        file["train/labels"] = np.array(TRUTH)
    train, test = (open_source(f"{path}::/{part}/images") for part in ("train", "test"))
    assert train.truth_N is not None and train.truth_N.tolist() == TRUTH
    assert test.truth_N is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": PIXELS, "y": PIXELS},
        {"x": PIXELS.astype(np.float32)},
        {"x": np.zeros((5, 2), np.uint8)},
    ],
)
def test_hdf5_without_one_set_of_images(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"a\.h5"):
        open_source(write_hdf5(tmp_path / "a.h5", **arrays))


def test_hdf5_without_any_image_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_hdf5(path, x=PIXELS[:0], labels=np.zeros(0, int), classes=in_bytes(["cat"]))
    with pytest.raises(BadData, match="no image in it"):
        open_source(str(path))


def test_labels_that_are_no_classes_are_told_what_they_should_be(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", x=PIXELS, labels=np.array(TRUTH) / 2)
    source = open_source(path)
    assert source.truth_N is None
    assert "'labels' beside the images: (N,) of integers" in str(no_classes(path, source.keys))


def test_pillow_says_nothing_of_pictures_that_it_reads(tmp_path: Path) -> None:
    """A palette with degrees of transparency, as the web has it."""
    (tmp_path / "web").mkdir()
    picture = Image.new("P", (8, 8))
    picture.putpalette(bytes(768))
    picture.save(tmp_path / "web/a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "web/a.png") as opened:
            opened.convert("RGB")
        assert len(told) == 1
        open_source(str(tmp_path / "web")).image(0)
    assert len(told) == 1


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source, bunch = open_source("digits"), load_digits()
    assert source.truth_N is not None
    np.testing.assert_array_equal(source.truth_N, bunch.target)
    for number in (0, 900, len(source) - 1):
        image = source.image(number)
        assert image.dtype == np.uint8 and (image == image[:, :, :1]).all()
        np.testing.assert_allclose(image[:, :, 0] / 255, bunch.images[number] / 16, atol=1 / 255)


# ---- torchvision ------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
@pytest.mark.parametrize(("split", "stem"), [("", "train"), ("@train", "train"), ("@test", "t10k")])
@pytest.mark.parametrize("root", ["plain", "with@sign"])
def test_idx_sets(name: str, folder: str, split: str, stem: str, root: str, tmp_path: Path) -> None:
    images = {"train": PIXELS[..., 0], "t10k": PIXELS[:3, ..., 1]}
    truth = {"train": np.array(TRUTH, np.uint8), "t10k": np.array([4, 4, 9], np.uint8)}
    raw = tmp_path / root / folder / "raw"
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[part])
        write_idx(raw / f"{part}-labels-idx1-ubyte", truth[part])
    source = open_source(f"{name}:{tmp_path / root}{split}")
    assert source.truth_N is not None and source.truth_N.tolist() == truth[stem].tolist()
    assert len(source.classes) == 10
    for number in range(len(source)):
        expected = np.stack([images[stem][number]] * 3, axis=2)
        np.testing.assert_array_equal(source.image(number), expected)


class StandIn:
    """As a torchvision data set: what it was asked for, and five images."""

    def __init__(self, root: str, **options: Any) -> None:
        self.root, self.options = root, options
        StandIn.last = self

    last: StandIn

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS[number]), 0


@pytest.mark.parametrize(
    ("spec", "class_name", "option", "attributes", "truth"),
    [
        ("cifar10:ROOT", "CIFAR10", {"train": True}, {"targets": TRUTH}, TRUTH),
        ("cifar10:ROOT@test", "CIFAR10", {"train": False}, {"targets": TRUTH}, TRUTH),
        ("cifar100:ROOT@test", "CIFAR100", {"train": False}, {"targets": TRUTH}, TRUTH),
        ("svhn:ROOT", "SVHN", {"split": "train"}, {"labels": np.array(TRUTH)}, TRUTH),
        ("svhn:ROOT@extra", "SVHN", {"split": "extra"}, {"labels": np.array(TRUTH)}, TRUTH),
        ("stl10:ROOT@test", "STL10", {"split": "test"}, {"labels": np.array(TRUTH)}, TRUTH),
        (
            "stl10:ROOT@all",
            "STL10",
            {"split": "train+unlabeled"},
            {"labels": np.array([1, 2, 3, -1, -1])},
            None,
        ),
    ],
)
def test_torchvision_sets(
    spec: str,
    class_name: str,
    option: dict[str, Any],
    attributes: dict[str, Any],
    truth: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets, class_name, type("Data", (StandIn,), attributes))
    source = open_source(spec)
    assert StandIn.last.root == "ROOT"
    assert StandIn.last.options == {**option, "download": False}
    assert (None if source.truth_N is None else source.truth_N.tolist()) == truth
    np.testing.assert_array_equal([source.image(number) for number in range(5)], PIXELS)


def test_imagenet_keys_are_paths_below_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"val/n{label}/{name}" for label, name in zip(TRUTH, NAMES, strict=True)]
    samples = [(str(tmp_path / name), label) for name, label in zip(names, TRUTH, strict=True)]
    stand_in = type("Data", (StandIn,), {"samples": samples, "targets": TRUTH})
    monkeypatch.setattr(datasets, "ImageNet", stand_in)
    source = open_source(f"imagenet:{tmp_path}@val")
    assert StandIn.last.options == {"split": "val"}
    assert source.keys == names
    assert source.truth_N is not None and source.truth_N.tolist() == TRUTH


def test_places365_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's reader, on lists that are ours and so have other checksums."""
    monkeypatch.setattr(
        datasets.places365, "check_integrity", lambda file, md5: Path(file).exists()
    )
    names = [
        f"/{'abc'[label]}/place_{label}/{name}" for label, name in zip(TRUTH, NAMES, strict=True)
    ]
    lines = [f"{name} {label}" for name, label in zip(names, TRUTH, strict=True)]
    (tmp_path / "categories_places365.txt").write_text("/a/place_0 0\n/b/place_1 1\n/c/place_2 2")
    (tmp_path / "places365_train_standard.txt").write_text("\n".join(lines))
    (tmp_path / "places365_val.txt").write_text("\n".join(f"{i}.jpg 1" for i in range(2)))
    for name, data in zip(names, FILES, strict=True):
        path = tmp_path / f"data_256_standard{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "val_256").mkdir()
    for number in range(2):
        (tmp_path / f"val_256/{number}.jpg").write_bytes(FILES[number])
    source = open_source(f"places365:{tmp_path}")
    assert source.keys == [name[1:] for name in names]
    assert source.truth_N is not None and source.truth_N.tolist() == TRUTH
    assert source.classes == ("/a/place_0", "/b/place_1", "/c/place_2")
    np.testing.assert_array_equal([source.image(number) for number in range(5)], PIXELS)
    tested = open_source(f"places365:{tmp_path}@val")
    assert tested.truth_N is not None and tested.truth_N.tolist() == [1, 1]
    np.testing.assert_array_equal([tested.image(number) for number in range(2)], PIXELS[:2])


def test_voc2007_folder(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    numbers = [f"{number:06d}" for number in range(5)]
    for number, data in zip(numbers, FILES, strict=True):
        # torchvision wants the name .jpg; a PNG inside keeps the pixels exact.
        (base / "JPEGImages" / f"{number}.jpg").write_bytes(data)
        (base / "Annotations" / f"{number}.xml").write_text("<annotation></annotation>")
    (base / "ImageSets/Main/trainval.txt").write_text("\n".join(numbers))
    (base / "ImageSets/Main/val.txt").write_text("\n".join(numbers[2:4]))
    (base / "ImageSets/Main/test.txt").write_text(numbers[4])
    source = open_source(f"voc2007:{tmp_path}")
    assert source.keys == [f"trainval/{number}.jpg" for number in numbers]
    assert source.truth_N is None
    np.testing.assert_array_equal([source.image(number) for number in range(5)], PIXELS)
    part = open_source(f"voc2007:{tmp_path}@val")
    np.testing.assert_array_equal([part.image(number) for number in range(2)], PIXELS[2:4])
    assert open_source(f"voc2007:{tmp_path}@test").keys == ["test/000004.jpg"]


@pytest.mark.parametrize("name", sorted(set(sources._TORCHVISION) - {"imagenet"}))
def test_missing_torchvision_root_mentions_download(name: str, tmp_path: Path) -> None:
    with pytest.raises(NoInput, match="--download"):
        open_source(f"{name}:{tmp_path / 'absent'}")


def test_missing_imagenet_can_not_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(NoInput) as caught:
        open_source(f"imagenet:{tmp_path / 'absent'}")
    assert "--download" not in str(caught.value)


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train, test"):
        open_source(f"mnist:{tmp_path}@validation")


def test_missing_path() -> None:
    with pytest.raises(NoInput, match="absent"):
        open_source("absent.tar")


# ---- keys and order ---------------------------------------------------------


def test_order_does_not_depend_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_folder(tmp_path, FOLDED["flat"])
    expected = open_source(spec).keys
    walk = sources.os.walk

    def backwards(root: Path) -> Any:
        for folder, subfolders, files in walk(root):
            subfolders.reverse()
            yield folder, subfolders, files[::-1]

    monkeypatch.setattr(sources.os, "walk", backwards)
    assert open_source(spec).keys == expected == sorted(FOLDED["flat"])


@pytest.mark.parametrize(
    "form",
    [
        lambda root: write_list(root, [*NAMES, NAMES[2]]),
        lambda root: write_hdf5(root / "a.h5", x=PIXELS, keys=in_bytes([*NAMES[:4], NAMES[0]])),
    ],
)
def test_duplicate_names_are_refused(form: Callable[[Path], str], tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"'0[02]\.png' is named twice"):
        open_source(form(tmp_path))


def test_of_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    """As when tar extracts what was appended; it is written backwards here."""
    source = open_source(write_tar(tmp_path / "a.tar", [*NAMES[:4], f"./{NAMES[0]}"]))
    assert source.keys == NAMES[:4]
    np.testing.assert_array_equal(source.image(0), PIXELS[0])


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_pictures_that_are_not_read_are_counted(write: Callable[..., str], tmp_path: Path) -> None:
    """Other files are not; and of JPEG all endings are known."""
    names = ["a.jfif", "a/b.JPE", "a/c.HEIC", "d.heic", "e.cr2", "f.txt", "._g.heic"]
    source = open_source(write(tmp_path / "a.tar", names, [*FILES, b"", b""]))
    assert source.keys == ["a.jfif", "a/b.JPE"] and source.unread == {".heic": 2, ".cr2": 1}
    np.testing.assert_array_equal(source.image(1), PIXELS[1])


def test_links_that_lead_nowhere_are_counted(tmp_path: Path) -> None:
    """Pipes are passed over, and so are links to what is no image by its name."""
    folder = tmp_path / "pictures"
    write_folder(folder)
    (folder / "lost.png").symlink_to("nothing.png")
    (folder / "lost.txt").symlink_to("nothing.txt")
    os.mkfifo(folder / "pipe.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, ".")
    for spec in (folder, tmp_path / "a.tar"):
        source = open_source(str(spec))
        assert source.keys == NAMES and source.unread == {"links to no file": 1}


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_the_notes_of_macos_are_no_images(write: Callable[..., str], tmp_path: Path) -> None:
    """Nor is a folder of them a class; other hidden files are images."""
    notes = ["a/._x.png", "__MACOSX/a/y.png", "b/__MACOSX/z.png"]
    names = ["a/x.png", "b/.hidden.png", *notes]
    source = open_source(write(tmp_path / "a.tar", names))
    assert source.keys == ["a/x.png", "b/.hidden.png"] and source.classes == ("a", "b")


@pytest.mark.parametrize(
    "form",
    [
        lambda root: str(root),
        lambda root: write_list(root, ["# nothing"]),
        lambda root: write_tar(root / "a.tar", [f"{number}.md" for number in range(5)]),
    ],
)
def test_no_images_at_all(form: Callable[[Path], str], tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no image"):
        open_source(form(tmp_path))


def test_a_compressed_tar_is_read_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its members are called: going back would be to begin again."""
    at: list[int] = []
    member_bytes = sources._member_bytes

    def noting(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        at.append(member.offset_data)
        return member_bytes(archive, member)

    monkeypatch.setattr(sources, "_member_bytes", noting)
    source = open_source(write_tar(tmp_path / "a.tar.gz", NAMES[::-1], FILES[::-1]))
    assert at == sorted(at) and len(at) == len(source) and source.keys == sorted(source.keys)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_tar_members_are_never_extracted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    hostile = ["../outside.png", str(tmp_path / "absolute.png"), "x/../../up.png", *NAMES[:2]]
    source = open_source(write_tar(inside / name, hostile))
    for number, key in enumerate(source.keys):
        np.testing.assert_array_equal(source.image(number), PIXELS[hostile.index(key)])
    assert {path.name for path in tmp_path.rglob("*")} == {"inside", name}


def test_tar_with_links_reads_files_only(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert open_source(str(path)).keys == NAMES


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
@pytest.mark.parametrize("inner", [".", "pictures"])
def test_tar_of_a_folder_with_links_is_the_folder(name: str, inner: str, tmp_path: Path) -> None:
    """Links that lead out of it or to nothing, of which a folder has none, are passed over."""
    folder = tmp_path / "pictures"
    write_folder(folder, [*NAMES[:3], "deep/a.png", "deep/plain"])
    (folder / "hard.png").hardlink_to(folder / NAMES[1])
    (folder / "deep/up.png").symlink_to("../hard.png")
    (folder / "chain.png").symlink_to("deep/./up.png")
    (folder / "named.png").symlink_to("deep/plain")
    (folder / "lost.png").symlink_to("nothing.png")
    (folder / "folder.png").symlink_to("deep")
    with tarfile.open(tmp_path / name, "w:gz" if name == "a.tgz" else "w") as archive:
        archive.add(folder, inner)
        for link, target in (("out", "/etc/hostname"), ("one", "two.png"), ("two", "one.png")):
            member = tarfile.TarInfo(f"{inner}/{link}.png")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    one, two = open_source(str(folder)), open_source(str(tmp_path / name))
    prefix = "" if inner == "." else f"{inner}/"
    assert len(one) == 8 and two.keys == [prefix + key for key in one.keys]
    for number in range(len(one)):
        np.testing.assert_array_equal(two.image(number), one.image(number))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
@pytest.mark.parametrize("damage", [b"\0", b"\xff"])
def test_damaged_tar_is_bad_data(name: str, damage: bytes, tmp_path: Path) -> None:
    """Never fewer images in silence, wherever the damage lies."""
    path = tmp_path / name
    noise = np.random.default_rng(2).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    write_tar(path, files=[png(pixels) for pixels in noise])
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    if name == "a.tar":
        # Past the name, in the header of the middle member: its checksum no longer holds.
        place = data.index(NAMES[2].encode()) + 100
    data[place : place + 40] = damage * 40
    path.write_bytes(data)
    with pytest.raises(BadData, match=r"a\.tar"):
        open_source(str(path))


# ---- decoding ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_comes_out_as_rgb(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(PIXELS[0]).convert(mode)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    image = open_source(str(tmp_path)).image(0)
    assert image.shape == (9, 7, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(picture.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    """Scaled to eight bits, not cut off at 255."""
    levels = np.linspace(0, 65535, 63).round().astype(np.uint16).reshape(9, 7)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = open_source(str(tmp_path)).image(0)
    np.testing.assert_allclose(image[:, :, 1] / 255, levels / 65535, atol=1.5 / 255)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.pgm").write_bytes(b"P5 7 9 65535\n" + levels.astype(">u2").tobytes())
    np.testing.assert_array_equal(open_source(str(tmp_path)).image(0), image)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_of_no_known_range_is_told_or_left_out(dtype: type, tmp_path: Path) -> None:
    """It would be black, or cut off."""
    write_folder(tmp_path)
    Image.fromarray(np.ones((9, 7), dtype)).save(tmp_path / "a.tif")
    source = open_source(str(tmp_path))
    with pytest.raises(BadData, match=r"a\.tif.*convert it to 8 or 16.*--skip-bad"):
        source.image(source.keys.index("a.tif"))
    assert open_images(str(tmp_path), 32, skip_bad=True)[0].keys == NAMES


def test_large_pictures_are_read_without_a_word_and_huge_ones_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Pillow warns beyond its limit, and refuses twice as many pixels as an attack."""
    write_folder(tmp_path, NAMES[:1], FILES[:1])
    source = open_source(str(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    np.testing.assert_array_equal(source.image(0), PIXELS[0])
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    told = r"63 pixels\) exceeds limit of 60 pixels\); make it smaller, or leave it out"
    with pytest.raises(BadData, match=told):
        source.image(0)


def _huge_header() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BROKEN = {
    "empty": b"",
    "text": b"no image\n" * 20,
    "truncated": FILES[2][:90],
    "huge": _huge_header(),
}


@pytest.mark.parametrize("write", [write_folder, write_tar])
@pytest.mark.parametrize("damage", BROKEN)
def test_broken_image_is_named_or_left_out(
    damage: str, write: Callable[..., str], tmp_path: Path
) -> None:
    files = [*FILES[:2], BROKEN[damage], *FILES[3:]]
    spec = write(tmp_path / "a.tar", files=files)
    with pytest.raises(BadData, match=r"02\.png.*--skip-bad"):
        open_images(spec, 32)
    images, _ = open_images(spec, 32, skip_bad=True)
    assert images.keys == [NAMES[row] for row in (0, 1, 3, 4)]
    assert images.index_N.tolist() == [0, 1, 3, 4]


def test_the_advice_for_a_broken_image_helps_where_there_is_no_skip_bad(tmp_path: Path) -> None:
    """As in `sela report` and `sela finetune`."""
    write_folder(tmp_path, NAMES[:1], [BROKEN["text"]])
    with pytest.raises(BadData, match=r"; repair it, or .*--skip-bad where a command has that"):
        open_source(str(tmp_path)).image(0)


def test_listed_but_absent_image_is_named(tmp_path: Path) -> None:
    spec = write_list(tmp_path, [*NAMES, "absent.png"])
    with pytest.raises(BadData, match=r"absent\.png"):
        open_images(spec, 32)
    images, _ = open_images(spec, 32, skip_bad=True)
    assert images.keys == NAMES


def test_a_class_behind_a_space_is_told_to_need_a_tab(tmp_path: Path) -> None:
    """Only where the image is there; names may have spaces."""
    names = ["a b.png", "c.png"]
    write_folder(tmp_path, names, FILES[:2])
    (tmp_path / "list.txt").write_text("a b.png\nc.png  owl\nd.png owl\n")
    source = open_source(str(tmp_path / "list.txt"))
    np.testing.assert_array_equal(source.image(0), PIXELS[0])
    with pytest.raises(BadData, match=r"'c\.png  owl' .*without the last word.*; write a tab"):
        source.image(1)
    with pytest.raises(BadData, match=r"No such file.*; repair it"):
        source.image(2)


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(BadData, match="none of its images"):
        open_images(str(tmp_path), 32, skip_bad=True)


def test_bad_images_are_sought_by_several_threads_and_in_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both, whole, told = threading.Barrier(2), [], []

    def decode(number: int) -> np.ndarray:
        whole.append(number)
        return np.zeros((300, 300, 3), np.uint8)

    def reduced(number: int, side: int) -> np.ndarray:
        if number in (10, 90):
            both.wait(10)
        if number in (0, 33):
            raise OSError("broken")
        return np.zeros((side, side, 3), np.uint8)

    source = Source("made", [str(n) for n in range(100)], decode, reduced=reduced)
    monkeypatch.setattr(batches, "open_source", lambda spec, download: source)
    monkeypatch.setattr(batches, "_processors", lambda: 2)
    images, _ = open_images(
        "made", 32, skip_bad=True, hold=False, progress=lambda *report: told.append(report)
    )
    assert images.index_N.tolist() == [n for n in range(100) if n not in (0, 33)]
    assert len(whole) < 20 and told[-1] == (100, 100, "")


@pytest.mark.parametrize("limit", [1, 2, 10, 1000, 1796])
def test_limit_spreads_evenly(limit: int) -> None:
    source = Source("made", [str(n) for n in range(1797)], lambda n: PIXELS[0], np.arange(1797))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "open_source", lambda spec, download: source)
        images, _ = open_images("made", 32, limit=limit)
    assert len(images) == limit
    assert images.index_N[0] == 0 and (limit == 1 or images.index_N[-1] == 1796)
    if limit > 2:
        gaps = np.diff(images.index_N)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert images.truth_N is not None and (images.truth_N == images.index_N).all()


def drawn(count: int, threads: set[int]) -> Source:
    """Images that have to be decoded; `threads` are those that did."""

    def decode(number: int) -> np.ndarray:
        threads.add(threading.get_ident())
        return np.full((9, 7, 3), number, np.uint8)

    return Source("drawn", [str(number) for number in range(count)], decode)


@pytest.fixture
def one_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that this process is allowed to use, of many."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7})
    batches._pool.cache_clear()
    yield
    batches._pool.cache_clear()


@pytest.mark.usefixtures("one_processor")
def test_all_collections_share_a_thread_for_each_processor() -> None:
    threads: set[int] = set()
    whole = Images(drawn(20, threads), 8, np.arange(20))
    for images in (whole, whole.subset(np.arange(5)), Images(drawn(6, threads), 8, np.arange(6))):
        for start, batch in images.in_order(2):
            assert batch[:, 0, 0, 0].tolist() == [start, start + 1][: len(batch)]
    assert len(threads) == 1


def test_a_forked_child_decodes_with_threads_of_its_own() -> None:
    images = Images(drawn(64, set()), 8, np.arange(64))
    rows_n = torch.arange(64)
    before = images.batch(rows_n)
    child = os.fork()
    if child == 0:
        equal = False
        try:
            signal.alarm(60)
            equal = torch.equal(images.batch(rows_n), before)
        finally:
            os._exit(not equal)
    assert os.waitpid(child, 0)[1] == 0


def test_limit_beyond_the_end_takes_all(tmp_path: Path) -> None:
    assert len(open_images(write_folder(tmp_path), 32, limit=6)[0]) == 5


def test_lazy_and_held_batches_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    spec = write_folder(tmp_path)
    held, _ = open_images(spec, 32)
    monkeypatch.setattr(batches, "_MEMORY_BYTES", 0)
    lazy, _ = open_images(spec, 32)
    assert held._held is not None and lazy._held is None
    rows = torch.tensor([3, 0, 3, 4])
    assert torch.equal(held.batch(rows), lazy.batch(rows))
    part = np.array([4, 1])
    expected = held.batch(torch.from_numpy(part))
    for images in (held.subset(part), lazy.subset(part)):
        assert images.keys == [NAMES[4], NAMES[1]] and images.index_N.tolist() == [4, 1]
        assert torch.equal(images.batch(torch.arange(2)), expected)
    # What is in memory is not copied, and what is not may be read into it later.
    assert held.subset(part)._held is held._held
    late = lazy.subset(part)
    monkeypatch.setattr(batches, "_MEMORY_BYTES", 1 << 30)
    late.hold(lambda done, total, note: None)
    assert late._held is not None and torch.equal(late.batch(torch.arange(2)), expected)


# ---- squares ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "side"), [(64, 64, 32), (64, 96, 32), (96, 64, 32), (20, 30, 40), (7, 7, 7)]
)
def test_square_is_resize_and_centre_crop(height: int, width: int, side: int) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = v2.Compose([v2.Resize(side), v2.CenterCrop(side)])(Image.fromarray(noise))
    np.testing.assert_array_equal(square(noise, side), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 1_000_000, 3), (999_999, 1, 3), (3, 300_001, 3)])
def test_of_a_line_the_middle_is_taken(shape: tuple[int, ...]) -> None:
    """Resized whole the first would have 65 GB."""
    line = np.zeros(shape, np.uint8)
    middle = [slice(max(0, n // 2 - 20), n // 2 + 21) for n in shape[:2]]
    line[tuple(middle)] = 200
    assert (square(line, 256) == 200).all()


@pytest.mark.parametrize(
    ("height", "width", "side"), [(100, 173, 32), (311, 97, 48), (33, 50, 64), (500, 375, 256)]
)
def test_square_is_within_a_pixel_of_torchvision(height: int, width: int, side: int) -> None:
    """torchvision rounds the longer edge and the offset otherwise."""
    rows, columns = np.mgrid[0:height, 0:width]
    ramps = [rows * 255 / height, columns * 255 / width, 0 * rows]
    ramp = np.stack(ramps, axis=2).round().astype(np.uint8)
    expected = v2.Compose([v2.Resize(side), v2.CenterCrop(side)])(Image.fromarray(ramp))
    got = square(ramp, side)
    assert got.shape == (side, side, 3)
    step = 255 / (side * np.array([height, width]) / min(height, width))
    difference = np.abs(got.astype(float) - np.asarray(expected)).max(axis=(0, 1))
    assert (difference[:2] <= step + 1.5).all()


@pytest.mark.parametrize(
    ("native", "size", "side"),
    [(8, 32, 32), (500, 32, 32), (32, 224, 32), (500, 224, 256), (200, 224, 256)],
)
def test_stored_side(native: int, size: int, side: int) -> None:
    assert stored_side(native, size) == side


@pytest.mark.parametrize(("side", "size"), [(64, 32), (65, 224)])
def test_default_image_size(side: int, size: int, tmp_path: Path) -> None:
    Image.new("RGB", (side, side)).save(tmp_path / "a.png")
    assert open_images(str(tmp_path), None)[1] == size


def test_a_disk_that_fails_is_no_damage_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "images.h5")
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((4, 3, 8, 8), np.uint8)
    source = open_source(path)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(NoInput, match="Input/output error"):
        source.image(0)
    with pytest.raises(NoInput, match="Input/output error"):
        open_images(path, 8, skip_bad=True)


def test_collections_are_alike_by_their_keys_and_pictures(tmp_path: Path) -> None:
    """Two of them are often called the same: 0.png, 1.png and so on."""
    for folder, names, files in (
        ("a", ["x.png", "y.png"], FILES[:2]),
        ("b", ["x.png", "y.png"], FILES[:2]),
        ("c", ["x.png", "y.png"], FILES[1:3]),
        ("d", ["x.png", "z.png"], FILES[:2]),
    ):
        write_folder(tmp_path / folder, names, files)
    sources = {name: open_source(str(tmp_path / name)) for name in "abcd"}
    packed = tmp_path / "packed.h5"
    pack_stage(open_images(str(tmp_path / "a"), 4)[0], str(packed), Provenance("pack", {}))
    sources["packed"] = open_source(str(packed))
    alike = [name for name, source in sources.items() if sources["a"].is_like(source)]
    assert alike == ["a", "b", "packed"]
