"""A packed collection is the collection: the same images, keys, classes and identity."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from sela_cli import envelope, interrupt
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, StoppedEarly
from sela_cli.images import batches, pack
from sela_cli.images.batches import Images, open_images
from sela_cli.images.pack import pack_stage, plan
from sela_cli.images.sources import open_source

COUNT = 11


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """JPEGs of several sizes, in three classes."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "photos" / ("owl", "bee", "cät")[number % 3] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (9, 7 + number, 3), dtype=np.uint8)
        Image.fromarray(small).resize((90 + 9 * number, 120)).save(path)
    return str(tmp_path / "photos")


def packed(spec: str, path: Path, side: int | None = None) -> str:
    images, _ = open_images(spec, None, side=side, hold=False)
    pack_stage(images, str(path), Provenance("pack", {}))
    return str(path)


def all_of(images: Images) -> torch.Tensor:
    return torch.cat([batch for _, batch in images.in_order(4)])


@pytest.mark.parametrize("side", [16, 64, None])
def test_a_packed_folder_is_the_folder(side: int | None, folder: str, tmp_path: Path) -> None:
    path = packed(folder, tmp_path / "a.h5", side)
    one, _ = open_images(folder, None, side=side)
    two, size = open_images(path, side)
    assert (two.side, size) == ((side, side) if side else (256, 224))
    assert one.keys == two.keys and one.dataset_id == two.dataset_id
    assert one.classes == two.classes == ("bee", "cät", "owl")
    assert one.truth_N is not None and two.truth_N is not None
    assert one.truth_N.tolist() == two.truth_N.tolist()
    assert torch.equal(all_of(one), all_of(two))
    assert envelope.read_header(path).dataset_id == one.dataset_id
    assert plan(two)["megabytes"] == pytest.approx(COUNT * 3 * two.side**2 / 1e6)


def test_a_packed_tar_is_the_folder_in_it(folder: str, tmp_path: Path) -> None:
    one, _ = open_images(folder, 16)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for key in reversed(list(one.keys)):
            tar.add(f"{folder}/{key}", arcname=key)
    two, _ = open_images(packed(str(tmp_path / "photos.tar"), tmp_path / "a.h5", 16), 16)
    assert two.truth_N is not None and one.truth_N is not None
    places = [list(two.keys).index(key) for key in one.keys]
    assert sorted(places) == list(range(COUNT)) and two.classes == one.classes
    assert torch.equal(all_of(two)[places], all_of(one))
    assert two.truth_N[places].tolist() == one.truth_N.tolist()


def test_a_packed_file_of_any_name_is_opened(folder: str, tmp_path: Path) -> None:
    images, _ = open_images(packed(folder, tmp_path / "photos.pack", 16), 16)
    assert images.keys == open_source(folder).keys


def test_a_packed_file_is_neither_held_nor_decoded(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of it, in any order, without decoding an image."""
    path = packed(folder, tmp_path / "a.h5", 64)
    whole, _ = open_images(folder, None, side=64)
    images, _ = open_images(path, 64, limit=5)
    monkeypatch.setattr(batches, "square", None)
    rows = np.linspace(0, COUNT - 1, 5).round().astype(int)
    assert torch.equal(all_of(images), whole.batch(torch.from_numpy(rows)))
    part = images.subset(np.array([3, 1]))
    assert torch.equal(all_of(part), whole.batch(torch.from_numpy(rows[[3, 1]])))
    with h5py.File(path) as file:
        assert file["images"].chunks is None and file["images"].compression is None


def test_what_is_done_to_a_batch_does_not_reach_the_file(folder: str, tmp_path: Path) -> None:
    images, _ = open_images(packed(folder, tmp_path / "a.h5", 64), 64)
    before = images.batch(torch.arange(2)).clone()
    images.batch(torch.arange(2)).zero_()
    assert torch.equal(images.batch(torch.arange(2)), before)


def test_a_packed_file_cut_short_meanwhile_is_an_error_not_a_crash(
    folder: str, tmp_path: Path
) -> None:
    path = packed(folder, tmp_path / "a.h5", 64)
    images, _ = open_images(path, 64)
    os.truncate(path, os.path.getsize(path) // 2)
    assert len(images.batch(torch.arange(2))) == 2
    with pytest.raises(BadData, match="ends too early, at row"):
        all_of(images)


def test_other_sizes_are_resized_from_the_packed_one(folder: str, tmp_path: Path) -> None:
    path = packed(folder, tmp_path / "a.h5", 256)
    small, _ = open_images(path, 32)
    pixels = open_source(path).image(0)
    assert small.side == 32
    np.testing.assert_array_equal(
        small.batch(torch.tensor([0]))[0].permute(1, 2, 0), batches.square(pixels, 32)
    )


def test_images_without_classes(folder: str, tmp_path: Path) -> None:
    bare = str(next(Path(folder).iterdir()))
    images, _ = open_images(packed(bare, tmp_path / "a.h5", 32), None)
    assert images.truth_N is None and images.classes == ()


def test_labels_that_number_no_class_are_refused(folder: str, tmp_path: Path) -> None:
    path = packed(folder, tmp_path / "a.h5", 32)
    with h5py.File(path, "r+") as file:
        file["labels"][2] = 3
    with pytest.raises(BadData, match="classes"):
        open_source(path)


def test_stopped_packing_leaves_nothing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    monkeypatch.setattr(pack, "_BATCH", COUNT - 1)
    with pytest.raises(StoppedEarly, match=f"after {COUNT - 1} images"):
        packed(folder, tmp_path / "a.h5", 32)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_signal_after_the_last_batch_stops_nothing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    monkeypatch.setattr(pack, "_BATCH", COUNT)
    assert envelope.read_header(packed(folder, tmp_path / "a.h5", 32)).kind == "images"


def test_batches_decoded_ahead_are_the_batches(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _ = open_images(folder, 64)
    loose, _ = open_images(folder, 64, hold=False)
    order = torch.randperm(COUNT).split(2)
    for rows_n, batch in zip(order, loose.stream(order), strict=True):
        assert torch.equal(batch, held.batch(rows_n))


def test_large_photographs_are_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    """And look the same: a JPEG of 1200 pixels is decoded at a quarter or half of them."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    source = open_source(str(tmp_path))
    reduced = source.image(0, 256)
    assert 256 <= min(reduced.shape[:2]) < 1200 == source.image(0).shape[0]
    exact = batches.square(source.image(0), 256).astype(int)
    assert np.abs(batches.square(reduced, 256) - exact).mean() < 1
