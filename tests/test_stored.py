"""Rows read as they lie in a file are those of the array, in any order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from sela_cli.errors import BadData, NoInput
from sela_cli.stored import Stored

ROWS = [
    slice(None),
    slice(2, 5),
    slice(3, 3),
    slice(4, 99),
    np.array([], int),
    np.array([0, 1, 2, 6, 4, 5, 4]),
    np.array([6, 5]),
]


def stored(path: Path, array: np.ndarray) -> Stored:
    """The array behind five bytes of something else."""
    path.write_bytes(b"12345" + array.tobytes())
    return Stored(str(path), array.dtype, array.shape, 5, "it")


@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", ">i8"])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4, 4)])
def test_rows_are_those_of_the_array(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    with (rows_of := stored(tmp_path / "a", array)).file:
        for rows in ROWS:
            np.testing.assert_array_equal(rows_of.read(rows), array[rows])
            assert rows_of.read(rows).dtype == array.dtype


@pytest.mark.parametrize("skipped", [0, 12, 24, 4096])
@pytest.mark.parametrize("piece", [1, 40, 1 << 20])
def test_what_lies_between_rows_may_be_read_too(
    skipped: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sela_cli.stored._SKIPPED", skipped)
    monkeypatch.setattr("sela_cli.stored._PIECE", piece)
    array = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    with (rows_of := stored(tmp_path / "a", array)).file:
        for step in (1, 2, 3, 50):
            rows = np.arange(0, 100, step)
            np.testing.assert_array_equal(rows_of.read(rows), array[rows])
        rows = np.array([99, 3, 4, 4, 6, 9, 2])
        np.testing.assert_array_equal(rows_of.read(rows), array[rows])


def test_a_file_cut_short_meanwhile_is_named(tmp_path: Path) -> None:
    array = np.arange(70, dtype=np.float32).reshape(7, 10)
    with (rows_of := stored(tmp_path / "a", array)).file:
        os.truncate(tmp_path / "a", 5 + 4 * 10 * 3 + 7)
        np.testing.assert_array_equal(rows_of.read(slice(0, 3)), array[:3])
        with pytest.raises(BadData, match="it ends too early, at row 3"):
            rows_of.read(np.array([0, 3]))


def test_a_disk_that_fails_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with (rows_of := stored(tmp_path / "a", np.ones((7, 3)))).file:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(NoInput, match="it: Input/output error"):
            rows_of.read(slice(0, 3))
