"""The files: what goes in comes out, whole or not at all, and damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sela_cli import envelope, formats, outputs
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, NoInput
from sela_cli.formats import Checkpoint, HeadLabels, Labels
from sela_cli.keys import RowNumbers, dataset_id, key_bytes, named, some_of, stored
from sela_cli.unfinished import Unfinished

PLAIN = Provenance("test", {"number": 1})
ATTRIBUTES = {
    "assign": "balanced",
    "lamb": 25.0,
    "tol": 1e-4,
    "residual": 1e-5,
    "n-iters": 2,
    "converged": True,
    "objective": 0.5,
    "lower-bound": 0.25,
}
CHECKPOINT_ATTRIBUTES = (
    "arch",
    "image-size",
    "heads",
    "step",
    "epoch",
    "recipe",
    "labels-digest",
)


def some_labels(keys: Sequence[str] = ("a", "b", "c"), seconds: float = 0.5) -> Labels:
    count = len(keys)
    heads = [
        HeadLabels(
            labels_N=np.arange(count) % clusters,
            potentials_K=np.linspace(-1, 1, clusters),
            attributes=ATTRIBUTES,
            trace={
                "iteration": np.arange(2),
                "residual": np.array([0.5, 1e-5]),
                "objective": np.array([0.1, 0.2]),
                "seconds": np.array([0.1, seconds]),
            },
        )
        for clusters in (2, 3)
    ]
    return Labels(list(keys), np.arange(count), heads)


def some_checkpoint(**changes: Any) -> Checkpoint:
    content: dict[str, Any] = {
        "model": {
            "trunk.0.weight": np.ones((2, 3), np.float32),
            "trunk.1.count": np.array(7, np.int64),
        },
        "optimizer": {"trunk.0.weight": np.full((2, 3), 0.5, np.float32)},
        "arch": "alexnet",
        "image_size": 32,
        "heads": [2, 3],
        "step": 5,
        "epoch": 1.25,
        "recipe": {"lr": 0.1, "lr_milestones": [0.5]},
        "labels_digest": "sha256:abc",
        "losses": np.array([3.0, 2.5], np.float32),
    }
    return Checkpoint(**content | changes)


def some_row(**changes: Any) -> dict[str, Any]:
    row = {"layer": "conv1", "method": "linear", "head": "0", "setting": "k=10", "lr": 0.01}
    row |= {"epoch": 36, "split": "test", "n": 9, "top1": 0.25, "top5": 1.0, "loss": 1.5}
    return row | changes


def write_labels(path: str, provenance: Provenance = PLAIN, **options: Any) -> None:
    formats.write_labels(path, some_labels(**options), provenance)


def write_logits(path: str, provenance: Provenance = PLAIN) -> None:
    with formats.create_logits(
        path, ["a", "b"], np.arange(2), provenance, columns={"logits/0": 3}, dtype="float32"
    ) as datasets:
        datasets["logits/0"][:] = np.arange(6).reshape(2, 3)


def write_factored(path: str, provenance: Provenance = PLAIN) -> None:
    head = (np.ones((4, 3)), np.arange(4.0))
    with formats.create_logits(
        path,
        ["a", "b"],
        np.arange(2),
        provenance,
        columns={"features": 3},
        dtype="float16",
        heads=[head],
    ) as datasets:
        datasets["features"][:] = np.arange(6).reshape(2, 3)


def write_checkpoint(path: str, provenance: Provenance = PLAIN) -> None:
    formats.write_checkpoint(path, some_checkpoint(), provenance)


def write_probe(path: str, provenance: Provenance = PLAIN) -> None:
    formats.write_probe(path, [some_row()], provenance)


def read_logits(path: str) -> None:
    with envelope.open_file(path, "logits") as (file, _):
        keys, _ = formats.read_images(path, file)
        for name in ("logits/0",) if "logits" in file else ("features", "heads/0/weight"):
            envelope.dataset(path, file, name, (None, None))[()]
        assert keys


WRITERS: list[Callable[..., None]] = [
    write_labels,
    write_logits,
    write_factored,
    write_checkpoint,
    write_probe,
]
READERS: dict[Callable[..., None], Callable[[str], Any]] = {
    write_labels: formats.read_labels,
    write_logits: read_logits,
    write_factored: read_logits,
    write_checkpoint: formats.read_checkpoint,
    write_probe: formats.read_probe,
}
EACH = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "file.h5")


# ---- round trips ------------------------------------------------------------

KEYS = st.lists(
    # Any bytes a file name may have come as a surrogate-escaped string.
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        st.binary(min_size=1)
        .filter(lambda name: b"\0" not in name)
        .map(lambda name: name.decode("utf-8", "surrogateescape")),
    ),
    min_size=1,
    max_size=6,
    unique=True,
)
ODD_KEYS = [" ", "a,b", 'q"uote', "new\nline", "trailing ", "naïve/Ωμέγα/日本.png", "\udcff\udc80"]


@settings(max_examples=60, deadline=None)
@given(KEYS)
def test_any_key_survives(keys: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/labels.h5"
        formats.write_labels(path, some_labels(keys), PLAIN.of(dataset_id(keys)))
        read = formats.read_labels(path)
    assert read.keys == keys
    assert read.header is not None and read.header.dataset_id == dataset_id(read.keys)


def test_one_long_key_does_not_make_a_file_large(path: str) -> None:
    keys = [f"folder/{number:06}.jpg" for number in range(20_000)] + ["long" * 1000]
    formats.write_labels(path, some_labels(keys), PLAIN)
    assert os.path.getsize(path) < 100 * len(keys)
    assert list(formats.read_labels(path).keys) == keys


def test_odd_keys_survive_in_logits(path: str) -> None:
    with formats.create_logits(
        path, ODD_KEYS, np.arange(7), PLAIN, columns={"logits/0": 1}, dtype="float32"
    ):
        pass
    with envelope.open_file(path, "logits") as (file, _):
        assert formats.read_images(path, file)[0] == ODD_KEYS
        assert h5py.check_string_dtype(file["keys"].dtype).encoding == "utf-8"


def test_dataset_id_is_what_the_schema_says() -> None:
    keys = [*ODD_KEYS, "plain"]
    text = b"".join(os.fsencode(key) + b"\0" for key in keys)
    assert dataset_id(keys) == "sha256:" + hashlib.sha256(text).hexdigest()
    assert dataset_id(keys) != dataset_id(keys[::-1])
    assert dataset_id(["ab", "c"]) != dataset_id(["a", "bc"])


@pytest.mark.parametrize("count", [1, 10, 11, 101, 70_001])
def test_numbers_of_rows_are_kept_as_their_texts_are(count: int) -> None:
    texts = [str(row) for row in range(count)]
    for some in (stored(RowNumbers(count)), stored(texts)):
        assert [key for _, block in some for key in block] == [key_bytes(key) for key in texts]
    assert dataset_id(RowNumbers(count)) == dataset_id(texts)
    assert isinstance(named(np.array(texts, "S")), RowNumbers)
    assert named(np.array(texts, "S")) == texts
    other = [*texts[:-1], "x"]
    assert not isinstance(named(np.array(other, "S")), RowNumbers)
    assert named(np.array(other, "S")) == other


def test_keys_of_a_file_are_as_a_list_of_them() -> None:
    """More than are made into text at a time, some of them no UTF-8; equal to no others."""
    texts = [f"{number % 7}/café {number}.jpg" for number in range(20_000)]
    texts[3] = key_bytes("a").decode() + "\udcff"
    raw_N = np.array([key_bytes(text) for text in texts], "S")
    keys = named(raw_N)
    assert not isinstance(keys, list)
    assert [*keys] == texts and keys == texts and texts == keys and keys == named(raw_N.copy())
    assert (keys[3], keys[-1], keys[17_000:17_003]) == (texts[3], texts[-1], texts[17_000:17_003])
    rows = np.array([5, 3, 19_999])
    assert some_of(keys, rows) == some_of(texts, rows) == [texts[5], texts[3], texts[19_999]]
    assert dataset_id(keys) == dataset_id(texts)
    assert keys != named(raw_N[::-1]) and keys != texts[::-1] and keys != texts[1:]
    with pytest.raises(IndexError):
        keys[len(texts)]


def test_labels_come_back(path: str) -> None:
    written = some_labels()
    written.index_N = np.array([4, 7, 9])
    formats.write_labels(path, written, PLAIN)
    read = formats.read_labels(path)
    assert (read.keys, read.index_N.tolist(), read.clusters) == (written.keys, [4, 7, 9], [2, 3])
    for one, other in zip(read.heads, written.heads, strict=True):
        assert one.labels_N.tolist() == other.labels_N.tolist()
        assert one.potentials_K.tolist() == other.potentials_K.tolist()
        assert one.attributes == ATTRIBUTES
        assert {name: values.tolist() for name, values in one.trace.items()} == {
            name: values.tolist() for name, values in other.trace.items()
        }
    with h5py.File(path) as file:
        assert file["labels"].dtype == np.int32 and file["potentials/0"].dtype == np.float64
        assert file["usage/0"].dtype == file["index"].dtype == np.int64
        counts = [np.sum(written.heads[1].labels_N == cluster) for cluster in range(3)]
        assert file["usage/1"][()].tolist() == counts


def test_random_labels_are_read_with_their_nans(path: str) -> None:
    labels = some_labels()
    unsolved = {"residual": np.nan, "objective": np.nan, "lower-bound": np.nan}
    for head in labels.heads:
        head.attributes = ATTRIBUTES | {"assign": "random"} | unsolved
        head.trace = {}
    formats.write_labels(path, labels, PLAIN)
    (head, _) = formats.read_labels(path).heads
    assert np.isnan([head.attributes[name] for name in unsolved]).all()
    assert head.trace == {}


ANY_ARRAY = arrays.arrays(
    st.sampled_from(["f4", "f8", "f2", "i8", "u1"]).map(np.dtype),
    arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
)


@settings(max_examples=40, deadline=None)
@given(
    model=st.dictionaries(st.from_regex(r"[a-z0-9_]+(\.[a-z0-9_]+)*", fullmatch=True), ANY_ARRAY),
    losses=arrays.arrays(np.float32, st.integers(0, 5)),
)
def test_checkpoint_comes_back(model: dict[str, np.ndarray], losses: np.ndarray) -> None:
    written = some_checkpoint(model=model, losses=losses)
    with tempfile.TemporaryDirectory() as folder:
        formats.write_checkpoint(f"{folder}/c.h5", written, PLAIN)
        read = formats.read_checkpoint(f"{folder}/c.h5")
    assert set(read.model) == set(model)
    for group, wanted in ((read.model, model), (read.optimizer, written.optimizer)):
        for name, array in wanted.items():
            assert group[name].dtype == array.dtype and group[name].shape == array.shape
            # Bit by bit: NaNs too.
            assert np.asarray(group[name]).tobytes() == array.tobytes()
    assert read.losses.tobytes() == losses.tobytes()
    for name in ("arch", "image_size", "heads", "step", "epoch", "recipe", "labels_digest"):
        assert getattr(read, name) == getattr(written, name)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    matrix=arrays.arrays(np.float32, (3, 4), elements=st.floats(width=16)),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_logits_come_back(matrix: np.ndarray, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/l.h5"
        with formats.create_logits(
            path, list("abc"), np.arange(3), PLAIN, columns={"logits/0": 4}, dtype=dtype
        ) as datasets:
            datasets["logits/0"][:2] = matrix[:2]
            datasets["logits/0"][2:] = matrix[2:]
        with envelope.open_file(path, "logits") as (file, _):
            read = file["logits/0"][()]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, matrix.astype(dtype))


@EACH
def test_attributes_may_be_strings_of_fixed_length(path: str, write: Callable[..., None]) -> None:
    """As C, MATLAB and R write them."""
    write(path)
    shown = envelope.describe(path)

    def fix(name: str, item: Any) -> None:
        for key, value in item.attrs.items():
            if isinstance(value, str):
                item.attrs[key] = np.bytes_(value.encode())

    with h5py.File(path, "r+") as file:
        fix("", file)
        file.visititems(fix)
        assert isinstance(file.attrs["format"], bytes)
        assert envelope.payload_digest(file) == shown["digest"]
    assert envelope.describe(path) == shown
    read = READERS[write](path)
    if isinstance(read, Checkpoint):
        assert (read.arch, read.labels_digest) == ("alexnet", "sha256:abc")


def test_probe_comes_back(path: str) -> None:
    rows = [some_row(), some_row(method="knn", lr=-1.0, epoch=-1, top1=1 / 3)]
    formats.write_probe(path, rows, PLAIN)
    assert formats.read_probe(path) == rows


def test_empty_probe_comes_back(path: str) -> None:
    formats.write_probe(path, [], PLAIN)
    assert formats.read_probe(path) == []


# ---- what the files are made of ---------------------------------------------


@EACH
def test_no_object_hides_in_a_file(path: str, write: Callable[..., None]) -> None:
    """Nothing of variable length or of h5py's own making: any HDF5 reader can follow."""
    write(path)

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            assert item.dtype.kind in "fiuSV" and item.external is None, name
            assert item.compression is None and item.chunks is None, name
        for value in item.attrs.values():
            assert isinstance(value, str | np.integer | np.floating | np.bool_), name

    with h5py.File(path) as file:
        look("/", file)
        file.visititems(look)


def test_scores_are_contiguous_from_the_offset_on(path: str) -> None:
    write_logits(path)
    with h5py.File(path) as file:
        offset = file["logits/0"].id.get_offset()
        values = file["logits/0"][()]
    raw = Path(path).read_bytes()[offset : offset + values.nbytes]
    assert np.frombuffer(raw, "<f4").tolist() == values.ravel().tolist()


@EACH
def test_root_attributes_are_those_of_the_schema(path: str, write: Callable[..., None]) -> None:
    write(path)
    with h5py.File(path) as file:
        root = dict(file.attrs)
    kind = write.__name__.removeprefix("write_").replace("factored", "logits")
    assert (root["format"], root["kind"], root["format-version"]) == ("HDF5::SeLa", kind, 1)
    assert json.loads(root["parameters"]) == {"number": 1}
    (own,) = json.loads(root["history"])
    assert own == {"command": "test", "parameters": {"number": 1}, "digest": root["digest"]}


# ---- the digest -------------------------------------------------------------


def digest_of_schema(path: str) -> str:
    """The payload's digest written anew from docs/schema.md, all in memory."""
    parts: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: parts.update({name: item}))
        digest = hashlib.sha256()
        for name, item in [("", file), *sorted(parts.items())]:
            if name.split("/")[-1] == "seconds":
                continue
            for attribute, value in sorted(item.attrs.items()):
                if attribute != "bytes-read" and (name or attribute not in envelope.ENVELOPE):
                    value = value.item() if isinstance(value, np.generic) else value
                    digest.update(f"{name}@{attribute}\0{json.dumps(value)}".encode())
            if isinstance(item, h5py.Dataset):
                digest.update(f"{name}\0{item.dtype.str}\0{json.dumps(item.shape)}\0".encode())
                digest.update(item[()].tobytes("C"))
    return "sha256:" + digest.hexdigest()


@EACH
def test_digest_is_that_of_the_schema(path: str, write: Callable[..., None]) -> None:
    write(path)
    assert envelope.read_header(path).digest == digest_of_schema(path)


@EACH
def test_digest_does_not_depend_on_time_place_or_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    headers = []
    for second in (0, 1_000_000_000):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(second))
        path = str(tmp_path / f"{second}.h5")
        write(path, Provenance(f"command {second}", {"second": second}))
        headers.append(envelope.read_header(path))
    assert [header.creation_date for header in headers] == [
        "1970-01-01T00:00:00Z",
        "2001-09-09T01:46:40Z",
    ]
    assert headers[0].digest == headers[1].digest


@EACH
def test_files_are_equal_byte_for_byte_at_one_source_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    for name in ("one.h5", "two.h5"):
        write(str(tmp_path / name))
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_later_attributes_are_kept_and_may_be_missing(path: str) -> None:
    labels = some_labels()
    later = {"status": "max-iter", "bytes-read": 1 << 40}
    labels.heads[0].attributes = ATTRIBUTES | later
    formats.write_labels(path, labels, PLAIN)
    assert envelope.read_header(path).digest == digest_of_schema(path)
    first, second = formats.read_labels(path).heads
    assert first.attributes == ATTRIBUTES | later and second.attributes == ATTRIBUTES


def test_bytes_read_are_no_result(tmp_path: Path) -> None:
    digests = []
    for count in (1, 2):
        labels = some_labels()
        labels.heads[0].attributes = ATTRIBUTES | {"status": "converged", "bytes-read": count}
        formats.write_labels(str(tmp_path / f"{count}.h5"), labels, PLAIN)
        digests.append(envelope.read_header(str(tmp_path / f"{count}.h5")).digest)
    assert digests[0] == digests[1]


def test_seconds_are_no_result(tmp_path: Path) -> None:
    for name, seconds in (("one.h5", 1.0), ("two.h5", 2.0)):
        write_labels(str(tmp_path / name), seconds=seconds)
    one, two = (envelope.read_header(str(tmp_path / name)) for name in ("one.h5", "two.h5"))
    assert one.digest == two.digest


@EACH
def test_any_other_payload_bit_changes_the_digest(path: str, write: Callable[..., None]) -> None:
    write(path)
    names: list[str] = []
    with h5py.File(path, "r+") as file:
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
        digest = envelope.payload_digest(file)
        seen = {digest}
        changed = [name for name in names if not name.endswith("seconds")]
        for name in changed:
            item = file[name]
            before = item[()]
            data = bytearray(np.asarray(before).tobytes())
            for place in (0, len(data) - 1):
                flipped = data.copy()
                flipped[place] ^= 1
                item[()] = np.frombuffer(flipped, item.dtype).reshape(item.shape)
                seen.add(envelope.payload_digest(file))
            item[()] = before
        assert envelope.payload_digest(file) == digest
        assert len(seen) == 1 + 2 * len(changed) - sum(
            file[name].size * file[name].dtype.itemsize == 1 for name in changed
        )


@pytest.mark.parametrize(
    ("write", "item", "attributes"),
    [
        (write_labels, "potentials/1", formats.LABEL_ATTRIBUTES),
        (write_checkpoint, "/", CHECKPOINT_ATTRIBUTES),
    ],
)
def test_payload_attributes_change_the_digest(
    path: str, write: Callable[..., None], item: str, attributes: Sequence[str]
) -> None:
    write(path)
    with h5py.File(path, "r+") as file:
        seen = {envelope.payload_digest(file)}
        for name in attributes:
            before = file[item].attrs[name]
            file[item].attrs[name] = "other"
            seen.add(envelope.payload_digest(file))
            file[item].attrs[name] = before
    assert len(seen) == 1 + len(attributes)


def test_digest_does_not_depend_on_the_size_of_the_blocks(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_logits(path)
    monkeypatch.setattr(envelope, "_CHUNK_BYTES", 1)
    with h5py.File(path) as file:
        assert envelope.payload_digest(file) == envelope.read_header(path).digest


# ---- provenance -------------------------------------------------------------


def test_history_and_inputs_lead_from_file_to_file(tmp_path: Path) -> None:
    logits, labels, model = (str(tmp_path / f"{name}.h5") for name in ("logits", "labels", "model"))
    write_logits(logits, Provenance("embed", {"seed": 0}, dataset_id="sha256:images"))
    embedded = envelope.read_header(logits)

    provenance = Provenance("label", {"lamb": 25.0}).reading("logits", embedded)
    write_labels(labels, provenance.of(embedded.dataset_id))
    labelled = envelope.read_header(labels)
    assert labelled.inputs == [{"role": "logits", "path": logits, "digest": embedded.digest}]
    assert labelled.dataset_id == "sha256:images"

    write_checkpoint(model, Provenance("train", {"to": 1.0}).reading("labels", labelled))
    again = (
        Provenance("train", {"to": 2.0})
        .reading("labels", labelled)
        .reading("checkpoint", envelope.read_header(model))
    )
    formats.write_checkpoint(model, some_checkpoint(step=6), again, force=True)
    trained = envelope.read_header(model)
    assert [entry["role"] for entry in trained.inputs] == ["labels", "checkpoint"]
    assert [entry["command"] for entry in trained.history] == ["embed", "label", "train", "train"]
    assert [entry["digest"] for entry in trained.history[:2]] == [embedded.digest, labelled.digest]
    assert trained.history[-1] == {
        "command": "train",
        "parameters": {"to": 2.0},
        "digest": trained.digest,
    }
    assert trained.parameters == {"to": 2.0}


def test_foreign_input_has_no_digest(path: str) -> None:
    write_labels(path, PLAIN.reading_foreign("scores", "scores.npy"))
    assert envelope.read_header(path).inputs == [
        {"role": "scores", "path": "scores.npy", "digest": ""}
    ]


def test_history_keeps_the_newest_entries_of_a_long_run(tmp_path: Path) -> None:
    path = str(tmp_path / "c.h5")
    header = None
    for number in range(20):
        provenance = Provenance("train", {"number": number})
        if header:
            provenance = provenance.reading("checkpoint", header)
        formats.write_checkpoint(path, some_checkpoint(step=number), provenance, force=True)
        header = envelope.read_header(path)
    assert header is not None
    assert [entry["parameters"]["number"] for entry in header.history] == list(range(4, 20))


@pytest.mark.parametrize("length", [40, 5000])
def test_history_of_long_parameters_can_still_be_written(tmp_path: Path, length: int) -> None:
    """Sixteen ancestors with long paths in their parameters; an attribute ends at 64 KiB."""
    path = str(tmp_path / "c.h5")
    provenance = Provenance("train", {"data": "x" * length})
    for number in range(16):
        formats.write_checkpoint(path, some_checkpoint(step=number), provenance, force=True)
        header = envelope.read_header(path)
        provenance = Provenance("train", {"data": "x" * length}).reading("checkpoint", header)
    assert header.history[-1]["digest"] == header.digest


# ---- whole or not at all ----------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, BadData])
@pytest.mark.parametrize("old", [None, b"an older file"])
def test_failure_inside_create_leaves_nothing(
    tmp_path: Path, error: type[BaseException], old: bytes | None
) -> None:
    target = tmp_path / "file.h5"
    if old is not None:
        target.write_bytes(old)
    with (
        pytest.raises(error),
        envelope.create(str(target), "labels", PLAIN, force=True) as file,
    ):
        file["half"] = np.ones(10)
        raise error("on the way")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if old is None else [old])


def test_failure_of_the_last_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file.h5").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotCreate, match=r"file\.h5: No space left"):
        formats.write_labels(str(tmp_path / "file.h5"), some_labels(), PLAIN, force=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_unfinished_work_stays_where_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file.h5.unfinished").write_text("hours of work")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(CannotCreate, match=r"file\.h5: No space left"):
        write_labels(str(tmp_path / "file.h5"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["hours of work"]


def test_target_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "file.h5"
    with envelope.create(str(target), "labels", PLAIN):
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file.h5"]


def test_what_another_command_left_unfinished_goes(tmp_path: Path) -> None:
    path, beside = tmp_path / "a.h5", tmp_path / "a.h5.unfinished"
    beside.write_text("of a training")
    write_labels(str(path))
    assert [each.name for each in tmp_path.iterdir()] == ["a.h5"]


@EACH
def test_existing_output_is_refused_without_force(path: str, write: Callable[..., None]) -> None:
    Path(path).write_bytes(b"precious")
    with pytest.raises(CannotCreate, match="--force") as caught:
        write(path)
    assert caught.value.exit_code == 73 and path in str(caught.value)
    assert Path(path).read_bytes() == b"precious"


def test_force_replaces(path: str) -> None:
    Path(path).write_bytes(b"old")
    formats.write_probe(path, [], PLAIN, force=True)
    assert formats.read_probe(path) == []


def test_output_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotCreate, match="no such folder"):
        outputs.check_output(str(tmp_path / "nowhere" / "file.h5"), force=True)
    with pytest.raises(CannotCreate, match="is a folder"):
        outputs.check_output(str(tmp_path), force=True)


def test_what_mends_a_missing_folder_is_a_command(tmp_path: Path) -> None:
    output = str(tmp_path / "two words; and $more" / "file.h5")
    with pytest.raises(CannotCreate) as caught:
        outputs.check_output(output, force=True)
    subprocess.run(caught.value.mend, shell=True, check=True)
    outputs.check_output(output, force=True)


def test_a_link_to_what_can_be_no_file_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link.h5"
    link.symlink_to(tmp_path / "nowhere" / "file.h5")
    with pytest.raises(CannotCreate, match="no such folder") as caught:
        outputs.check_output(str(link), force=False)
    subprocess.run(caught.value.mend, shell=True, check=True)
    write_labels(str(link))
    assert link.is_symlink() and formats.read_labels(str(tmp_path / "nowhere" / "file.h5"))


def test_names_are_refused_where_those_beside_would_be_too_long(tmp_path: Path) -> None:
    longest = f"{'é' * 120}.h5"
    write_labels(str(tmp_path / f"{longest}5"))
    Unfinished(str(tmp_path / longest[10:]), "train", {}).write(some_checkpoint())
    (tmp_path / "link.h5").symlink_to(f"{longest}55")
    for name in (f"{longest}55", "x" * 300, "link.h5"):
        with pytest.raises(CannotCreate, match="too long"):
            outputs.check_output(str(tmp_path / name), force=False)
    with pytest.raises(CannotCreate, match="too long"):
        Unfinished(str(tmp_path / longest), "train", {})


def test_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As root, --force -o /dev/null would take the device away from everybody."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CannotCreate):
        outputs.check_output(str(pipe), force=True)


# ---- reading what does not fit ----------------------------------------------


@EACH
def test_newer_version_is_refused_and_names_the_release(
    path: str, write: Callable[..., None]
) -> None:
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format-version"] = 2
        file.attrs["generated-by"] = "sela-9.8.7"
    for read in (READERS[write], envelope.read_header, envelope.describe):
        with pytest.raises(BadData, match=r"format-version 2.*sela-9\.8\.7"):
            read(path)


@EACH
def test_other_kinds_are_refused(path: str, write: Callable[..., None]) -> None:
    write(path)
    for other, read in READERS.items():
        kinds = {w.__name__.replace("factored", "logits") for w in (other, write)}
        if len(kinds) == 2:
            with pytest.raises(BadData, match="is needed here") as caught:
                read(path)
            assert path in str(caught.value)


def test_unknown_kind_is_refused(path: str) -> None:
    write_labels(path)
    with h5py.File(path, "r+") as file:
        file.attrs["kind"] = "poem"
    with pytest.raises(BadData, match="'poem'"):
        envelope.read_header(path)


@pytest.mark.parametrize("name", [n for n in envelope.ENVELOPE if n != "format"])
def test_missing_root_attribute_is_named(path: str, name: str) -> None:
    write_labels(path)
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
    for read in (formats.read_labels, envelope.describe):
        with pytest.raises(BadData, match=name) as caught:
            read(path)
        assert path in str(caught.value)


@pytest.mark.parametrize("name", ["parameters", "history", "inputs"])
@pytest.mark.parametrize("value", ["{", "5", 5])
def test_root_attribute_of_another_structure_is_bad_data(
    path: str, name: str, value: object
) -> None:
    write_labels(path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    for read in (formats.read_labels, envelope.describe):
        with pytest.raises(BadData) as caught:
            read(path)
        assert path in str(caught.value)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_labels, "keys"),
        (write_labels, "index"),
        (write_labels, "labels"),
        (write_labels, "potentials/0"),
        (write_labels, "potentials/1"),
        (write_logits, "keys"),
        (write_logits, "index"),
        (write_logits, "logits/0"),
        (write_factored, "features"),
        (write_factored, "heads/0/weight"),
        (write_checkpoint, "model"),
        (write_checkpoint, "optimizer"),
        (write_checkpoint, "losses"),
        (write_probe, "results"),
    ],
)
def test_missing_part_is_named(path: str, write: Callable[..., None], name: str) -> None:
    write(path)
    with h5py.File(path, "r+") as file:
        del file[name]
        # An empty group is left, so that the reader knows which form it reads.
        file.require_group("logits") if write is write_logits else None
    with pytest.raises(BadData) as caught:
        READERS[write](path)
    assert path in str(caught.value) and f"'{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("write", "name", "value"),
    [
        (write_labels, "keys", np.arange(3)),
        (write_labels, "keys", np.array([b"a", b"b"])),
        (write_labels, "index", np.arange(2)),
        (write_labels, "labels", np.zeros((2, 4), np.int32)),
        (write_labels, "labels", np.zeros((2, 3))),
        (write_labels, "labels", np.zeros((0, 3), np.int32)),
        (write_labels, "labels", np.full((2, 3), 9, np.int32)),
        (write_labels, "labels", np.full((2, 3), -1, np.int32)),
        (write_labels, "potentials/0", np.zeros((2, 2))),
        (write_checkpoint, "losses", np.zeros((2, 2), np.float32)),
        (write_probe, "results", np.zeros(3)),
    ],
)
def test_part_that_does_not_fit_is_named(
    path: str, write: Callable[..., None], name: str, value: np.ndarray
) -> None:
    write(path)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = value
        if name.startswith("potentials"):
            file[name].attrs.update(ATTRIBUTES)
    with pytest.raises(BadData) as caught:
        READERS[write](path)
    assert path in str(caught.value)
    # A wrong number of keys shows first in what is counted by them.
    named = ["index"] if name == "keys" and value.dtype.kind == "S" else [name]
    assert all(f"'{part}'" in str(caught.value) for part in named)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_labels, "trace/0"),
        (write_labels, "trace/0/residual"),
        (write_checkpoint, "model/trunk.0.weight"),
        (write_checkpoint, "model"),
    ],
)
def test_group_and_dataset_exchanged_is_bad_data(
    path: str, write: Callable[..., None], name: str
) -> None:
    write(path)
    with h5py.File(path, "r+") as file:
        was_group = isinstance(file[name], h5py.Group)
        del file[name]
        if was_group:
            file[name] = np.zeros(3)
        else:
            file.create_group(name)
    with pytest.raises(BadData) as caught:
        READERS[write](path)
    assert path in str(caught.value)


def test_probe_without_a_column_is_bad_data(path: str) -> None:
    write_probe(path)
    with h5py.File(path, "r+") as file:
        table = file["results"][()]
        del file["results"]
        file["results"] = table[["layer", "method"]].copy()
    with pytest.raises(BadData, match="top1"):
        formats.read_probe(path)


@pytest.mark.parametrize("name", formats.LABEL_ATTRIBUTES)
def test_missing_attribute_of_labels_is_named(path: str, name: str) -> None:
    write_labels(path)
    with h5py.File(path, "r+") as file:
        del file["potentials/1"].attrs[name]
    with pytest.raises(BadData, match=f"'potentials/1'.*{name}") as caught:
        formats.read_labels(path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("arch", "vit"), ("arch", ""), ("image-size", -5), ("image-size", 0), ("heads", "[]")),
        *(("heads", "[5, 0]"), ("heads", "5"), ("recipe", "[1]"), ("recipe", "null")),
    ],
)
def test_a_checkpoint_of_what_is_no_network_is_bad_data(path: str, name: str, value: Any) -> None:
    write_checkpoint(path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(BadData, match="bad checkpoint attributes") as caught:
        formats.read_checkpoint(path)
    assert path in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize("name", CHECKPOINT_ATTRIBUTES)
def test_missing_attribute_of_a_checkpoint_is_named(path: str, name: str) -> None:
    write_checkpoint(path)
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
    with pytest.raises(BadData, match=f"'{name}'") as caught:
        formats.read_checkpoint(path)
    assert path in str(caught.value)


@EACH
def test_truncated_file_is_bad_data_at_any_length(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    whole, cut = str(tmp_path / "whole.h5"), str(tmp_path / "cut.h5")
    write(whole)
    data = Path(whole).read_bytes()
    for size in {0, 1, 7, 8, 9, 95, 96, 97, len(data) - 1, *range(0, len(data), len(data) // 20)}:
        Path(cut).write_bytes(data[:size])
        for read in (READERS[write], envelope.read_header, envelope.describe):
            with pytest.raises(BadData) as caught:
                read(cut)
            assert cut in str(caught.value) and "\n" not in str(caught.value)


@EACH
def test_damaged_object_header_is_bad_data(path: str, write: Callable[..., None]) -> None:
    """Not any flipped byte: some of them send libhdf5 itself into an endless loop."""
    write(path)
    name = {write_logits: "logits/0", write_factored: "features", write_labels: "labels"}.get(
        write, "losses" if write is write_checkpoint else "results"
    )
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file[name].id).addr
    with Path(path).open("r+b") as stream:
        stream.seek(address)
        stream.write(b"\xff" * 8)
    for read in (READERS[write], envelope.describe):
        with pytest.raises(BadData) as caught:
            read(path)
        assert path in str(caught.value)


def test_foreign_missing_and_folder(tmp_path: Path) -> None:
    foreign = str(tmp_path / "foreign.h5")
    with h5py.File(foreign, "w") as file:
        file["x"] = np.ones(3)
    (tmp_path / "text.h5").write_text("no HDF5")
    for read in (envelope.read_header, envelope.describe, *READERS.values()):
        with pytest.raises(BadData, match="not a sela file") as caught:
            read(foreign)
        assert foreign in str(caught.value)
        with pytest.raises(BadData, match=r"text\.h5: damaged or not HDF5"):
            read(str(tmp_path / "text.h5"))
        with pytest.raises(BadData, match="folder"):
            read(str(tmp_path))
        with pytest.raises(NoInput, match=r"nowhere\.h5"):
            read(str(tmp_path / "nowhere.h5"))


def test_describe_tells_everything_but_the_numbers(path: str) -> None:
    write_labels(path)
    shown = envelope.describe(path)
    assert envelope.through_json(shown) == shown
    assert (shown["kind"], shown["command"], shown["parameters"]) == (
        "labels",
        "test",
        {"number": 1},
    )
    with h5py.File(path) as file:
        names: list[str] = []
        file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
    assert set(shown["datasets"]) == set(names)
    assert shown["attributes"]["potentials/0@lamb"] == ATTRIBUTES["lamb"]


def test_reading_does_not_lock_a_copy_out(path: str) -> None:
    """A reader can hold the old file while a new one takes its place."""
    write_probe(path)
    with envelope.open_file(path, "probe") as (file, _):
        formats.write_probe(path, [some_row(n=99)], PLAIN, force=True)
        assert file["results"]["n"].tolist() == [9]
    assert formats.read_probe(path)[0]["n"] == 99


def test_copy_has_the_same_digest(tmp_path: Path, path: str) -> None:
    write_factored(path)
    shutil.copy(path, tmp_path / "copy.h5")
    assert (
        envelope.read_header(path).digest == envelope.read_header(str(tmp_path / "copy.h5")).digest
    )
