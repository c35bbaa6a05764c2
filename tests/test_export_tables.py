"""Labels and logits in other programs' forms, read back by those programs' libraries."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from sela_cli import cli, export_tables, extras, formats
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, MissingExtra, UsageError
from sela_cli.formats import HeadLabels, Labels
from sela_cli.images.sources import open_source

KEYS = ["a/cat.jpg", "b/cat.jpg", "b/dög, two.jpg", "c.jpg"]
LABELS_TN = ([2, 0, 1, 2], [0, 0, 1, 1])


def labels_of(*heads: list[int], keys: list[str] = KEYS) -> Labels:
    return Labels(
        keys,
        np.arange(len(keys)),
        [HeadLabels(np.array(head), np.zeros(max(head) + 1), {}) for head in heads],
    )


def table_of(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV or Parquet file, as text."""
    if path.suffix == ".parquet":
        columns = parquet.read_table(path).to_pydict()
        return {name: [str(value) for value in values] for name, values in columns.items()}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_hold_keys_and_labels(suffix: str, tmp_path: Path) -> None:
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    export_tables.write_labels_as(labels_of(LABELS_TN[0]), str(one))
    export_tables.write_labels_as(labels_of(*LABELS_TN), str(two))
    first, second = ([str(label) for label in labels] for labels in LABELS_TN)
    assert table_of(one) == {"key": KEYS, "label": first}
    assert table_of(two) == {"key": KEYS, "label_0": first, "label_1": second}


def test_lines_of_a_table_end_as_other_programs_read_them(tmp_path: Path) -> None:
    """With a line feed alone; a name that has an end of line in it comes back all the same."""
    for keys in (["a.jpg", "b.jpg"], ["a\r.jpg", "b\n.jpg"]):
        path = tmp_path / f"{len(keys[0])}.csv"
        export_tables.write_labels_as(labels_of([1, 0], keys=keys), str(path))
        assert path.read_bytes().endswith(b"0\n") and b"\r\n" not in path.read_bytes()
        assert table_of(path) == {"key": keys, "label": ["1", "0"]}


def test_arrays_hold_labels_in_the_order_of_the_file(tmp_path: Path) -> None:
    export_tables.write_labels_as(labels_of(LABELS_TN[0]), str(tmp_path / "one.npy"))
    export_tables.write_labels_as(labels_of(*LABELS_TN), str(tmp_path / "two.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), LABELS_TN[0])
    np.testing.assert_array_equal(np.load(tmp_path / "two.npy"), np.transpose(LABELS_TN))


def test_labels_go_nowhere_they_should_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.csv, \.parquet, \.npy"):
        export_tables.write_labels_as(labels_of(LABELS_TN[0]), str(tmp_path / "labels.xlsx"))
    for suffix in export_tables.LABEL_SUFFIXES:
        path = tmp_path / f"taken{suffix}"
        path.write_text("precious")
        with pytest.raises(CannotCreate, match="--force"):
            export_tables.write_labels_as(labels_of(LABELS_TN[0]), str(path))
        assert path.read_text() == "precious"
    odd = labels_of([0], keys=["\udcff.jpg"])
    with pytest.raises(BadData, match="not UTF-8"):
        export_tables.write_labels_as(odd, str(tmp_path / "odd.parquet"))
    assert not (tmp_path / "odd.parquet").exists()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for key in KEYS:
        path = tmp_path / "photos" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(key)
    return tmp_path / "photos"


def test_links_lead_from_each_cluster_to_its_images(photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "clusters"
    assert export_tables.write_links(labels_of(*LABELS_TN), str(photos), str(target)) == 8
    for head, labels in enumerate(LABELS_TN):
        folders = sorted((target / f"head-{head}").iterdir())
        assert [folder.name for folder in folders] == [f"cluster-{k}" for k in range(len(folders))]
        for cluster, folder in enumerate(folders):
            found = {link.read_text() for link in folder.iterdir() if link.is_symlink()}
            wanted = {key for key, label in zip(KEYS, labels, strict=True) if label == cluster}
            assert found == wanted and len(list(folder.iterdir())) == len(wanted)


def test_links_to_long_names(tmp_path: Path) -> None:
    """A row's number leaves less room than there was."""
    (tmp_path / "photos").mkdir()
    name = f"{'é' * 125}.jpg"
    (tmp_path / "photos" / name).write_text("here")
    labels = labels_of([0], keys=[name])
    export_tables.write_links(labels, str(tmp_path / "photos"), str(tmp_path / "links"))
    (link,) = (tmp_path / "links/head-0/cluster-0").iterdir()
    assert link.read_text() == "here" and link.suffix == ".jpg"


def test_links_replace_nothing_and_are_made_whole_or_not_at_all(
    photos: Path, tmp_path: Path
) -> None:
    for name in ("links", "two words"):
        (tmp_path / name).mkdir()
        with pytest.raises(CannotCreate) as caught:
            export_tables.write_links(labels_of(LABELS_TN[0]), str(photos), str(tmp_path / name))
        command = caught.value.mend.partition(", or")[0]
        assert shlex.split(command) == ["rm", "-r", str(tmp_path / name)]
        (tmp_path / name).rmdir()
    (photos / KEYS[3]).unlink()
    with pytest.raises(BadData, match=r"has no 'c\.jpg'"):
        export_tables.write_links(labels_of(LABELS_TN[0]), str(photos), str(tmp_path / "clusters"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_only_links_of_ours_are_offered_to_be_removed(photos: Path, tmp_path: Path) -> None:
    def mend(name: str) -> str:
        with pytest.raises(CannotCreate, match="exists") as caught:
            export_tables.write_links(labels_of(LABELS_TN[0]), str(photos), str(tmp_path / name))
        return caught.value.mend

    export_tables.write_links(labels_of(*LABELS_TN), str(photos), str(tmp_path / "ours"))
    assert mend("ours").startswith("rm -r ")
    (tmp_path / "ours/head-0/cluster-0/notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "favourites").mkdir()
    (tmp_path / "favourites/cat.jpg").symlink_to(photos / KEYS[0])
    for name in ("ours", "file", "favourites"):
        assert mend(name) == "name another folder"


def test_links_never_join_the_images(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(photos / "a")
    before = open_source(str(photos)).keys
    for inside in ("photos", "photos/clusters", "photos/b/../clusters", "alias/c"):
        with pytest.raises(UsageError, match="name a folder outside of"):
            export_tables.write_links(labels_of(*LABELS_TN), str(photos), str(tmp_path / inside))
    for around in (tmp_path, tmp_path.parent, photos / ".."):
        with pytest.raises(UsageError, match=r"photos is in .*; name another folder"):
            export_tables.write_links(labels_of(*LABELS_TN), str(photos), str(around))
    assert open_source(str(photos)).keys == before == sorted(KEYS)


def test_logits_and_features_become_arrays(
    write_logits: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    plain = [rng.normal(size=(9, 3)).astype(np.float32), rng.normal(size=(9, 2))]
    path = write_logits(*plain)
    output = str(tmp_path / "out.npy")
    assert export_tables.write_logits_as_npy(path, output, head=1) == (9, 2)
    np.testing.assert_array_equal(np.load(output), plain[1].astype(np.float32))
    with pytest.raises(UsageError, match=r"heads 0\.\.1, no head 2"):
        export_tables.write_logits_as_npy(path, output, head=2, force=True)
    with pytest.raises(BadData, match="no features"):
        export_tables.write_logits_as_npy(path, output, features=True, force=True)

    features, weight, bias = (
        rng.normal(size=shape).astype(np.float32) for shape in ((9, 5), (4, 5), (4,))
    )
    factored = str(tmp_path / "factored.h5")
    with formats.create_logits(
        factored,
        [str(row) for row in range(9)],
        np.arange(9),
        Provenance("test", {}),
        columns={"features": 5},
        dtype="float16",
        heads=[(weight, bias)],
    ) as datasets:
        datasets["features"][:] = features
    export_tables.write_logits_as_npy(factored, output, features=True, force=True)
    stored = np.load(output)
    np.testing.assert_array_equal(stored, features.astype(np.float16))
    with Path(factored).open("rb") as pipe:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        export_tables.write_logits_as_npy("-", output, features=True, force=True)
    np.testing.assert_array_equal(np.load(output), stored)
    export_tables.write_logits_as_npy(factored, output, force=True)
    expected = stored.astype(np.float64) @ weight.T.astype(np.float64) + bias
    np.testing.assert_allclose(np.load(output), expected, rtol=1e-4, atol=1e-5)


# ---- optional packages ------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("report", "report runs/none -o report.html"),
        ("report", "info labels.h5 --plot trace.png"),
        ("parquet", "export-labels labels.h5 -o labels.parquet"),
        ("tensorboard", "run --data digits --out run --tensorboard"),
        ("voc", "finetune --data voc2007:root -c c.h5 -o ap.h5 --task detection"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    extra: str,
    arguments: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # What import does where a package is not installed.
    monkeypatch.setitem(sys.modules, extras.EXTRAS[extra][-1], None)
    monkeypatch.setattr(sys, "argv", ["sela", *arguments.split()])
    monkeypatch.setattr("sela_cli.interrupt.listen", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == MissingExtra.exit_code == 69
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"pip install 'sela[{extra}]'" in said
    assert list(tmp_path.iterdir()) == []


def test_installed_packages_are_not_missed() -> None:
    for extra in extras.EXTRAS:
        extras.require(extra)


def test_a_table_is_not_written_where_the_links_are_refused(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.h5"
    labels = labels_of(LABELS_TN[0])
    labels.heads[0].attributes.update(formats.unsolved("random"))
    formats.write_labels(str(path), labels, Provenance("test", {}))
    (tmp_path / "links").mkdir()
    line = f"export-labels {path} -o {tmp_path}/t.csv --links {tmp_path}/links --data {photos}"
    with pytest.raises(CannotCreate, match="links exists"):
        CliRunner().invoke(cli.app, line.split(), catch_exceptions=False)
    assert not (tmp_path / "t.csv").exists()
