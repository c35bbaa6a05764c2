"""Every container of one matrix gives the same rows; what is no matrix is refused."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from sela_cli import envelope, formats, scores
from sela_cli.errors import BadData, NoInput
from sela_cli.keys import dataset_id

N, K, D = 11, 4, 3
RNG = np.random.default_rng(1)
# Small integers: float16 holds them, and the product in float32, exactly.
FEATURES = RNG.integers(-9, 9, (N, D)).astype(np.float64)
WEIGHT = RNG.integers(-9, 9, (K, D)).astype(np.float32)
BIAS = RNG.integers(-9, 9, K).astype(np.float32)
MATRIX = FEATURES @ WEIGHT.T + BIAS
DTYPES = ["float16", "float32", "float64"]
Write = Callable[[Path, np.ndarray], str]


def ours(
    path: Path,
    arrays: dict[str, np.ndarray],
    heads: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> str:
    keys = [f"k{row}" for row in range(N)]
    with formats.create_logits(
        str(path),
        keys,
        np.arange(N),
        envelope.Provenance("test", {}, dataset_id=dataset_id(keys)),
        columns={name: array.shape[1] for name, array in arrays.items()},
        dtype=next(iter(arrays.values())).dtype.str,
        heads=heads or [],
    ) as datasets:
        for name, array in arrays.items():
            datasets[name][:] = array
    return str(path)


def explicit(folder: Path, matrix: np.ndarray) -> str:
    return ours(folder / "ours.h5", {"logits/0": matrix})


def explicit_named(folder: Path, matrix: np.ndarray) -> str:
    return ours(folder / "ours.h5", {"logits/0": -matrix, "logits/1": matrix}) + "::logits/1"


def factored(folder: Path, matrix: np.ndarray) -> str:
    features = FEATURES.astype(matrix.dtype)
    return ours(folder / "ours.h5", {"features": features}, [(WEIGHT, BIAS)])


def foreign(folder: Path, matrix: np.ndarray, **options: object) -> str:
    with h5py.File(folder / "foreign.h5", "w") as file:
        file.create_dataset("deep/scores", data=matrix, **options)
        file["names"] = np.array([b"a", b"b"])
        file["vector"] = np.arange(3.0)
    return str(folder / "foreign.h5")


def foreign_named(folder: Path, matrix: np.ndarray) -> str:
    path = foreign(folder, matrix)
    with h5py.File(path, "r+") as file:
        file["another"] = -matrix
    return f"{path}::/deep/scores"


def foreign_chunked(folder: Path, matrix: np.ndarray) -> str:
    return foreign(folder, matrix, chunks=(2, 3), compression="gzip")


def foreign_linked(folder: Path, matrix: np.ndarray) -> str:
    part = foreign(folder, matrix)
    with h5py.File(folder / "linked.h5", "w") as file:
        file["scores"] = h5py.ExternalLink(part, "/deep/scores")
    return str(folder / "linked.h5::/scores")


def foreign_big_endian(folder: Path, matrix: np.ndarray) -> str:
    return foreign(folder, matrix.astype(matrix.dtype.newbyteorder(">")))


def foreign_userblock(folder: Path, matrix: np.ndarray) -> str:
    with h5py.File(folder / "foreign.h5", "w", userblock_size=512) as file:
        file["scores"] = matrix
    return str(folder / "foreign.h5")


def npy(folder: Path, matrix: np.ndarray) -> str:
    np.save(folder / "a.npy", matrix)
    return str(folder / "a.npy")


def npy_fortran(folder: Path, matrix: np.ndarray) -> str:
    return npy(folder, np.asfortranarray(matrix))


def npy_big_endian(folder: Path, matrix: np.ndarray) -> str:
    return npy(folder, matrix.astype(matrix.dtype.newbyteorder(">")))


def npy_without_suffix(folder: Path, matrix: np.ndarray) -> str:
    return str(Path(npy(folder, matrix)).rename(folder / "scores"))


def npz(folder: Path, matrix: np.ndarray) -> str:
    np.savez_compressed(folder / "a.npz", scores=matrix)
    return str(folder / "a.npz")


def npz_plain(folder: Path, matrix: np.ndarray) -> str:
    np.savez(folder / "a.npz", scores=matrix)
    return str(folder / "a.npz")


def npz_with_others(folder: Path, matrix: np.ndarray) -> str:
    others = {"names": np.array(["a", "b"]), "words": np.array([["a"]]), "cube": np.ones((2, 2, 2))}
    np.savez(folder / "a.npz", scores=matrix, ids=np.arange(N), **others)
    return str(folder / "a.npz")


def npz_named(folder: Path, matrix: np.ndarray) -> str:
    np.savez(folder / "a.npz", other=-matrix, scores=np.asfortranarray(matrix))
    return str(folder / "a.npz") + "::scores"


def tensors(folder: Path, matrix: np.ndarray) -> str:
    save_file({"scores": matrix}, folder / "a.safetensors")
    return str(folder / "a.safetensors")


def tensors_with_others(folder: Path, matrix: np.ndarray) -> str:
    others = {"ids": np.arange(N), "cube": np.ones((2, 2, 2))}
    save_file({"scores": matrix, **others}, folder / "a.safetensors")
    return str(folder / "a.safetensors")


def tensors_named(folder: Path, matrix: np.ndarray) -> str:
    save_file({"scores": matrix, "other": -matrix}, folder / "a.safetensors")
    return str(folder / "a.safetensors") + "::scores"


CONTAINERS = [
    explicit,
    explicit_named,
    factored,
    foreign,
    foreign_named,
    foreign_chunked,
    foreign_linked,
    foreign_big_endian,
    foreign_userblock,
    npy,
    npy_fortran,
    npy_big_endian,
    npy_without_suffix,
    npz,
    npz_plain,
    npz_with_others,
    npz_named,
    tensors,
    tensors_with_others,
    tensors_named,
]


def by_name(write: Write) -> str:
    return write.__name__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", CONTAINERS, ids=by_name)
def test_all_containers_give_the_same_rows(tmp_path: Path, write: Write, dtype: str) -> None:
    with scores.open_scores(write(tmp_path, MATRIX.astype(dtype))) as opened:
        (matrix,) = opened.heads
        assert matrix.shape == (N, K)
        for rows in (
            slice(None),
            slice(0, 4),
            slice(8, 8 + N),
            slice(N, N + 3),
            np.array([0, 3, 4, N - 1]),
            np.array([], dtype=np.int64),
        ):
            block = matrix.read(rows)
            assert type(block) is np.ndarray and block.dtype.kind == "f"
            np.testing.assert_array_equal(block.astype(np.float64), MATRIX[rows])


@pytest.mark.parametrize("write", CONTAINERS, ids=by_name)
def test_rows_have_keys(tmp_path: Path, write: Write) -> None:
    with scores.open_scores(write(tmp_path, MATRIX)) as opened:
        letter = "k" if opened.header else ""
        assert opened.keys == [f"{letter}{row}" for row in range(N)]
        assert opened.index_N.tolist() == list(range(N))
        assert opened.dataset_id == dataset_id(opened.keys)


def test_rows_of_anybodys_file_are_called_as_the_keys_beside_them(tmp_path: Path) -> None:
    path = foreign(tmp_path, np.zeros((3, 2)))
    with h5py.File(path, "r+") as file:
        file["deep/keys"] = ["b/ü.jpg", "a.jpg", "c.jpg"]
    with scores.open_scores(path) as opened:
        assert opened.keys == ["b/ü.jpg", "a.jpg", "c.jpg"]
        assert opened.dataset_id == dataset_id(opened.keys)
    with h5py.File(path, "r+") as file:
        file["deep/keys"][1] = "c.jpg"
    with pytest.raises(BadData, match="twice"), scores.open_scores(path):
        pass


def test_keys_may_be_numbers_and_are_to_name_every_row(tmp_path: Path) -> None:
    path = foreign(tmp_path, np.zeros((3, 2)))
    with h5py.File(path, "r+") as file:
        file["deep/keys"] = np.array([7, 8, 900], np.uint16)
    with scores.open_scores(path) as opened:
        assert opened.keys == ["7", "8", "900"]
    with h5py.File(path, "r+") as file:
        del file["deep/keys"]
        file["deep/keys"] = ["a", "b"]
    with pytest.raises(BadData, match=r"names 2 rows, .* has 3"), scores.open_scores(path):
        pass
    with h5py.File(path, "r+") as file:
        del file["deep/keys"]
        # As of attention.
        file["deep/keys"] = np.zeros((3, 4))
    with scores.open_scores(f"{path}::/deep/scores") as opened:
        assert opened.keys == ["0", "1", "2"]


def test_only_our_files_have_a_header(tmp_path: Path) -> None:
    with scores.open_scores(explicit(tmp_path, MATRIX)) as opened:
        assert opened.header == envelope.read_header(str(tmp_path / "ours.h5"))
    with scores.open_scores(foreign(tmp_path, MATRIX)) as opened:
        assert opened.header is None


def test_integers_are_scores(tmp_path: Path) -> None:
    with scores.open_scores(npy(tmp_path, MATRIX.astype(np.int16))) as opened:
        np.testing.assert_array_equal(opened.heads[0].read(slice(None)), MATRIX)


def test_explicit_heads_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    arrays = {f"logits/{number}": np.full((N, 1), number, np.float32) for number in range(12)}
    with scores.open_scores(ours(tmp_path / "many.h5", arrays)) as opened:
        assert [head.read(slice(1))[0, 0] for head in opened.heads] == list(range(12))


def test_factored_heads_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    heads = [(WEIGHT, BIAS + number) for number in range(12)]
    path = ours(tmp_path / "many.h5", {"features": FEATURES.astype(np.float32)}, heads)
    with scores.open_scores(path) as opened:
        for number, head in enumerate(opened.heads):
            np.testing.assert_array_equal(head.read(slice(None)), MATRIX + number)


# A user block hides the signature, and a pipe has no suffix to go by.
@pytest.mark.parametrize("write", [w for w in CONTAINERS if w != foreign_userblock], ids=by_name)
def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    path, mark, name = write(tmp_path, MATRIX).partition("::")
    stream = io.BytesIO(Path(path).read_bytes())
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=stream))
    with scores.open_scores("-" + mark + name) as opened:
        np.testing.assert_array_equal(opened.heads[0].read(slice(None)), MATRIX)


# ---- refused ----------------------------------------------------------------


def refusal(spec: str) -> str:
    """The message of the BadData that opening `spec`, or reading it, raises."""
    with ExitStack() as stack, pytest.raises(BadData) as caught:
        opened = stack.enter_context(scores.open_scores(spec))
        for head in opened.heads:
            head.read(slice(None))
    message = str(caught.value)
    assert "\n" not in message
    return message


def two_npz(folder: Path) -> str:
    np.savez(folder / "two.npz", first=MATRIX, second=MATRIX)
    return str(folder / "two.npz")


def two_tensors(folder: Path) -> str:
    save_file({"first": MATRIX, "second": MATRIX}, folder / "two.safetensors")
    return str(folder / "two.safetensors")


def two_hdf5(folder: Path) -> str:
    with h5py.File(folder / "two.h5", "w") as file:
        file["first"] = MATRIX
        file["second"] = MATRIX
    return str(folder / "two.h5")


TWO = pytest.mark.parametrize("write", [two_npz, two_tensors, two_hdf5], ids=by_name)


@TWO
def test_ambiguous_name_is_refused_and_the_names_are_shown(
    tmp_path: Path, write: Callable[[Path], str]
) -> None:
    path = write(tmp_path)
    message = refusal(path)
    assert "first" in message and "second" in message and f"{path}::" in message


@TWO
def test_absent_name_is_refused(tmp_path: Path, write: Callable[[Path], str]) -> None:
    path = write(tmp_path)
    message = refusal(f"{path}::third")
    assert path in message and "third" in message


def test_name_in_a_npy_is_refused(tmp_path: Path) -> None:
    """It holds one array, which has no name: the user means another file."""
    assert "third" in refusal(npy(tmp_path, MATRIX) + "::third")


@pytest.mark.parametrize("suffix", [".h5", ".npy", ".npz", ".safetensors", ""])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 100, 5000])
def test_empty_and_random_bytes_are_refused(tmp_path: Path, suffix: str, size: int) -> None:
    path = tmp_path / f"random{suffix}"
    path.write_bytes(np.random.default_rng(size).bytes(size))
    assert str(path) in refusal(str(path))


@pytest.mark.parametrize("write", [explicit, factored, foreign, npy, npz, tensors], ids=by_name)
def test_every_truncation_is_refused(tmp_path: Path, write: Write) -> None:
    whole = Path(write(tmp_path, MATRIX))
    data = whole.read_bytes()
    cut = tmp_path / f"cut{whole.suffix}"
    for size in {0, 1, len(data) - 1, *range(2, len(data), max(1, len(data) // 40))}:
        cut.write_bytes(data[:size])
        assert str(cut) in refusal(str(cut))


@pytest.mark.parametrize("write", [npy, npz, tensors], ids=by_name)
def test_flipped_byte_is_bad_data_or_harmless(tmp_path: Path, write: Write) -> None:
    """It may go unseen in the numbers, but never becomes another exception."""
    whole = Path(write(tmp_path, MATRIX))
    data = bytearray(whole.read_bytes())
    hurt = tmp_path / f"hurt{whole.suffix}"
    others = set()
    for place in range(len(data)):
        copy = data.copy()
        copy[place] ^= 0xFF
        hurt.write_bytes(copy)
        try:
            with scores.open_scores(str(hurt)) as opened:
                opened.heads[0].read(slice(None))
        except BadData:
            pass
        except Exception as error:
            others.add(type(error).__name__)
    assert others == set()


def test_bytes_between_the_rows_of_a_chunked_file_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few at a time: a sample takes no more memory than its own rows ask for."""
    matrix = np.arange(600.0).reshape(100, 6)
    monkeypatch.setattr("sela_cli.scores._BETWEEN_VALUES", 60)
    path, wanted = foreign_chunked(tmp_path, matrix), np.arange(3, 100, 4)
    with scores.open_scores(path) as opened:
        assert (opened.heads[0].read(wanted) == matrix[wanted]).all()
        assert matrix[wanted].nbytes < opened.heads[0].tally.take() < matrix.nbytes
        # So far apart that they are looked up one by one.
        assert (opened.heads[0].read(wanted[::4]) == matrix[wanted[::4]]).all()
        assert opened.heads[0].tally.take() == matrix[wanted[::4]].nbytes


@pytest.mark.parametrize("write", [npy, npz_plain, tensors, tensors_named], ids=by_name)
def test_rows_that_lie_in_a_file_are_not_read_before_they_are_wanted(
    tmp_path: Path, write: Write
) -> None:
    matrix = np.random.default_rng(0).normal(size=(20_000, 30)).astype(np.float32)
    spec, before = write(tmp_path, matrix), has_read()
    with scores.open_scores(spec) as opened:
        np.testing.assert_array_equal(opened.heads[0].read(slice(7, 9)), matrix[7:9])
        assert has_read() - before < matrix.nbytes / 10


def has_read() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_chunk_is_decoded_once_for_all_its_rows(tmp_path: Path) -> None:
    """It is far larger than HDF5's own cache, and than what is asked for at a time."""
    array = np.random.default_rng(0).normal(size=(6000, 400))
    with h5py.File(tmp_path / "scores.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=(3000, 400), compression="lzf")

    with scores.open_scores(str(tmp_path / "scores.h5")) as opened:
        before = has_read()
        tiles = [opened.heads[0].read(slice(at, at + 500)) for at in range(0, 6000, 500)]
        assert has_read() - before < 1.5 * (tmp_path / "scores.h5").stat().st_size
    np.testing.assert_array_equal(np.concatenate(tiles), array)


def test_a_chunk_of_more_than_the_cache_is_decoded_once_and_counts_as_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_CACHE_BYTES", 1 << 20)
    array = np.random.default_rng(0).normal(size=(6000, 100))
    with h5py.File(tmp_path / "scores.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=array.shape, compression="lzf")
        # Parts of what is not compressed are read from where they lie.
        file.create_dataset("plain", data=array, chunks=array.shape)
    with scores.open_scores(f"{tmp_path / 'scores.h5'}::x") as opened:
        before = has_read()
        tiles = [opened.heads[0].read(slice(at, at + 500)) for at in range(0, 6000, 500)]
        assert has_read() - before < 1.5 * array.nbytes
        assert opened.heads[0].resident >= array.nbytes
    np.testing.assert_array_equal(np.concatenate(tiles), array)
    with scores.open_scores(f"{tmp_path / 'scores.h5'}::plain") as opened:
        assert opened.heads[0].resident == 0


@pytest.mark.parametrize("filtered", [True, False])
def test_a_filter_that_is_not_installed_is_named(filtered: bool, tmp_path: Path) -> None:
    """Where it was left out in writing, as HDF5 may, the numbers are read."""
    path, array = str(tmp_path / "scores.h5"), np.arange(12.0).reshape(4, 3)
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4, 3))
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((4, 3))
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F64LE, space, dcpl=plist)
        # The mask says what was left out.
        made.write_direct_chunk((0, 0), array.tobytes(), filter_mask=0 if filtered else 1)
    if filtered:
        with pytest.raises(BadData, match="filter 32001"), scores.open_scores(path):
            pass
    else:
        with scores.open_scores(path) as opened:
            np.testing.assert_array_equal(opened.heads[0].read(slice(0, 4)), array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_mapping_counts_as_memory_where_it_is_read_by_its_pages(
    order: str, tmp_path: Path
) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=(50, 7)), order=order)
    np.save(tmp_path / "a.npy", array)
    with scores.open_scores(str(tmp_path / "a.npy")) as opened:
        assert opened.heads[0].resident == (array.nbytes if order == "F" else 0)
        np.testing.assert_array_equal(opened.heads[0].read(slice(10, 20)), array[10:20])


def test_mostly_zeros_are_no_bomb(tmp_path: Path) -> None:
    """Two probabilities a row: gzip makes a few hundredths of a percent of it."""
    array = np.zeros((12_000, 1000))
    array[np.arange(12_000), np.arange(12_000) % 1000] = 1
    with h5py.File(tmp_path / "scores.h5", "w") as file:
        file.create_dataset("x", data=array, chunks=(1000, 1000), compression="gzip")
    assert (tmp_path / "scores.h5").stat().st_size * 200 < array.nbytes
    with scores.open_scores(str(tmp_path / "scores.h5")) as opened:
        np.testing.assert_array_equal(opened.heads[0].read(slice(0, 2)), array[:2])


@pytest.mark.parametrize("part", ["chunk", "header"])
def test_damaged_hdf5_is_refused(tmp_path: Path, part: str) -> None:
    path = foreign_chunked(tmp_path, MATRIX)
    with h5py.File(path) as file:
        item = file["deep/scores"]
        chunk = item.id.get_chunk_info(0).byte_offset
        address = chunk if part == "chunk" else h5py.h5o.get_info(item.id).addr
    with Path(path).open("r+b") as stream:
        stream.seek(address)
        stream.write(b"\xff" * 8)
    assert path in refusal(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path(tmp_path / "sprung").touch, ())  # type: ignore[return-value]

    array = np.array([[Trap()]], dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", array=array)
    for name in ("a.npy", "a.npz"):
        assert name in refusal(str(tmp_path / name))
    assert not (tmp_path / "sprung").exists()


def test_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    assert "notes.npz" in refusal(str(tmp_path / "notes.npz"))


@pytest.mark.parametrize("write", [foreign, npy, npz, tensors], ids=by_name)
@pytest.mark.parametrize("shape", [(12,), (2, 2, 3), ()])
def test_other_ranks_are_refused(tmp_path: Path, write: Write, shape: tuple[int, ...]) -> None:
    path = write(tmp_path, np.ones(shape))
    assert path in refusal(path)


@pytest.mark.parametrize("shape", [(12,), (2, 2, 3)])
def test_other_ranks_are_refused_with_the_shape_where_a_name_is_given(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    message = refusal(foreign(tmp_path, np.ones(shape)) + "::deep/scores")
    assert str(shape) in message and "deep/scores" in message


@pytest.mark.parametrize("write", [foreign_named, npy, npz], ids=by_name)
@pytest.mark.parametrize("dtype", ["S3", "complex128", "bool", "longdouble"])
def test_what_is_no_number_is_refused(tmp_path: Path, write: Write, dtype: str) -> None:
    array = np.ones((2, 2)).astype(dtype)
    if write is foreign_named:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["deep/scores"] = array
        spec = f"{tmp_path}/a.h5::deep/scores"
    else:
        spec = write(tmp_path, array)
    assert spec.partition("::")[0] in refusal(spec)


def test_unicode_strings_are_refused(tmp_path: Path) -> None:
    assert "<U1" in refusal(npy(tmp_path, np.array([["a", "b"]])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensors_that_numpy_lacks_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.from_numpy(MATRIX).to(dtype)
    save_torch_file({"scores": stored}, tmp_path / "b.safetensors")
    with scores.open_scores(str(tmp_path / "b.safetensors")) as opened:
        (matrix,) = opened.heads
        np.testing.assert_array_equal(matrix.read(slice(0, N)), stored.float().numpy())


def test_they_are_read_where_another_package_has_taught_numpy_of_them(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    test_tensors_that_numpy_lacks_are_read(torch.bfloat16, tmp_path)


@pytest.mark.parametrize("name", ["some.csv", "it's $HOME `here`.csv", 'so "quoted" \\.csv'])
def test_the_advice_for_text_can_be_pasted(tmp_path: Path, name: str) -> None:
    np.savetxt(tmp_path / name, MATRIX, delimiter=",")
    with contextlib.chdir(tmp_path):
        advice = refusal(name).split("convert it: ")[1]
        python = Path(sys.executable).parent
        subprocess.run(advice, shell=True, check=True, env=os.environ | {"PATH": str(python)})
        with scores.open_scores("scores.npy") as opened:
            np.testing.assert_array_equal(opened.heads[0].read(slice(None)), MATRIX)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(NoInput, match=r"nowhere\.npy"), scores.open_scores("nowhere.npy"):
        pass
    assert "folder" in refusal(str(tmp_path))


def test_group_is_no_matrix(tmp_path: Path) -> None:
    assert "'deep'" in refusal(foreign(tmp_path, MATRIX) + "::deep")


@pytest.mark.parametrize("name", ["keys", "index", "logits/0"])
def test_missing_part_of_an_explicit_file_is_named(tmp_path: Path, name: str) -> None:
    path = ours(tmp_path / "ours.h5", {"logits/0": MATRIX, "logits/1": MATRIX})
    with h5py.File(path, "r+") as file:
        del file[name]
    message = refusal(path)
    assert path in message and f"'{name}'" in message


@pytest.mark.parametrize("name", ["heads/0/weight", "heads/0/bias", "heads", "features"])
def test_missing_part_of_a_factored_file_is_named(tmp_path: Path, name: str) -> None:
    path = factored(tmp_path, MATRIX)
    with h5py.File(path, "r+") as file:
        del file[name]
    message = refusal(path)
    assert path in message and f"'{name}'" in message


@pytest.mark.parametrize("name", ["heads/0/weight", "heads/0/bias", "features"])
def test_numbers_wider_than_torch_has_are_refused(tmp_path: Path, name: str) -> None:
    path = factored(tmp_path, MATRIX)
    with h5py.File(path, "r+") as file:
        values = file[name][()].astype(np.longdouble)
        del file[name]
        file[name] = values
    message = refusal(path)
    assert path in message and name in message and "float128" in message


def test_features_whose_width_is_not_the_heads_are_refused(tmp_path: Path) -> None:
    path = ours(tmp_path / "o.h5", {"features": FEATURES}, [(WEIGHT[:, 1:], BIAS)])
    message = refusal(path)
    assert "heads/0/weight" in message and str((K, D - 1)) in message


def test_rows_and_keys_must_agree(tmp_path: Path) -> None:
    path = explicit(tmp_path, MATRIX)
    with h5py.File(path, "r+") as file:
        del file["logits/0"]
        file["logits/0"] = MATRIX[1:]
    message = refusal(path)
    assert f"{N - 1} rows" in message and f"{N} keys" in message


def test_groups_that_are_datasets_are_refused(tmp_path: Path) -> None:
    for name in ("logits", "heads"):
        path = explicit(tmp_path, MATRIX) if name == "logits" else factored(tmp_path, MATRIX)
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = MATRIX
        assert f"'{name}" in refusal(path)
        Path(path).unlink()


def test_another_kind_of_our_files_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "probe.h5")
    formats.write_probe(path, [], envelope.Provenance("test", {}))
    assert "holds probe" in refusal(path)


def test_rows_without_names_are_called_by_their_numbers(tmp_path: Path) -> None:
    """As a list of them would be, which is not made."""
    with scores.open_scores(npy(tmp_path, np.zeros((12, 3)))) as opened:
        keys = opened.keys
        names = [str(row) for row in range(12)]
        assert [*keys] == names and keys == names and names == keys
        assert (keys[3], keys[-1], keys[2:5]) == ("3", "11", names[2:5])
        assert keys != names[:-1] and keys != [*names[:-1], "x"]
        assert opened.dataset_id == dataset_id(names)
        assert not isinstance(keys, list)


@pytest.mark.parametrize("dtype", [np.float64, ">f4"])
def test_heads_of_other_programs_are_taken(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(2)
    features, weight = rng.standard_normal((40, 6)), rng.standard_normal((5, 6))
    path = str(tmp_path / "logits.h5")
    with formats.create_logits(
        path,
        [f"{row}.png" for row in range(40)],
        np.arange(40),
        envelope.Provenance("test", {}),
        columns={"features": 6},
        dtype="float32",
        heads=[(weight.astype(np.float32), np.ones(5, np.float32))],
    ) as datasets:
        datasets["features"][:] = features
    with h5py.File(path, "r+") as file:
        for name, values in (("weight", weight), ("bias", np.ones(5))):
            del file[f"heads/0/{name}"]
            file[f"heads/0/{name}"] = values.astype(dtype)
    with scores.open_scores(path) as opened:
        found = opened.heads[0].read(slice(0, 40))
    np.testing.assert_allclose(found, features @ weight.T + 1, atol=1e-5)


@pytest.mark.parametrize("form", ["logits", "features"])
def test_heads_lie_side_by_side(form: str, tmp_path: Path) -> None:
    """And features, of which all are made, are read once."""
    heads = [(WEIGHT, BIAS), (WEIGHT[:2], BIAS[:2] + 1)]
    expected = [FEATURES @ weight.T + bias for weight, bias in heads]
    if form == "logits":
        arrays = {f"logits/{n}": each.astype(np.float32) for n, each in enumerate(expected)}
        path = ours(tmp_path / "ours.h5", arrays)
    else:
        path = ours(tmp_path / "ours.h5", {"features": FEATURES.astype(np.float32)}, heads)
    with scores.open_scores(path) as opened:
        matrix, rows = opened.side_by_side(), slice(1, 3)
        np.testing.assert_array_equal(matrix.read(rows), np.hstack(expected)[rows])
        assert matrix.shape == (N, K + 2)
        if opened.features:
            assert matrix.tally.take() == 2 * D * 4
