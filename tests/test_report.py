"""The report: its numbers are those of the files, its page needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import softmax

from sela_cli import formats, loop, networks
from sela_cli.errors import BadData, CannotCreate, NoInput, UsageError
from sela_cli.formats import HeadLabels, Labels
from sela_cli.images.batches import open_images
from sela_cli.images.sources import open_source
from sela_cli.loop import Watcher
from sela_cli.report import contents as contents_of
from sela_cli.report import figures, page
from sela_cli.report.contents import Contents
from sela_cli.run_settings import settings_of
from sela_cli.spread import spread

IMAGES, HEADS, ROUNDS = 60, (5, 8), 3
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@contextmanager
def no_progress(title: str) -> Iterator[Any]:
    yield lambda done, total, note: None


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a very small network on a few digits."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    options: dict[str, Any] = {
        "arch": "alexnet-small", "heads": "5,8", "epochs": 3.0, "opts": 4, "batch_size": 16,
        "precision": "float32",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks._FILTERS, "alexnet-small", (4, 6, 6, 6, 4))
        images = open_images("digits", 16, limit=IMAGES)[0]
        settings = settings_of("digits", 16, options)
        loop.run(images, folder, settings, Watcher(no_progress, lambda text: None))
    return folder


@pytest.fixture(scope="module")
def contents(run_folder: Path) -> Contents:
    return contents_of.read(run_folder)


@pytest.fixture(scope="module")
def text(contents: Contents) -> str:
    return page_of(contents)


def page_of(contents: Contents, clusters: int = 100, images: int = 12) -> str:
    shown = contents_of.gallery(contents, clusters, images)
    return page.page(contents, figures.draw(contents), shown)


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of each <script>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)


def data_of(text: str) -> dict[str, Any]:
    return json.loads(Elements(text).scripts[0])


def test_files_beside_a_run_are_passed_over(
    run_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    shutil.copy(folder / "probe.h5", folder / "probe-mine.h5")
    shutil.copy(folder / "labels.h5", folder / "probe-labels.h5")
    (folder / "probe-notes.h5").write_text("no HDF5")
    with h5py.File(folder / "photos.h5", "w") as file:
        file["photos"] = np.zeros(3)
    found = contents_of.read(folder)
    assert found.digests.keys() - contents.digests.keys() == {"probe-mine.h5"}
    assert [name for name, _ in found.probes] == ["probe-000.h5", "probe-mine.h5", "probe.h5"]
    (folder / "probe.h5").write_text("no HDF5")
    with pytest.raises(BadData, match=r"probe\.h5"):
        contents_of.read(folder)


def test_a_report_never_takes_the_place_of_what_it_reads(
    run_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    packed = tmp_path / "digits.h5"
    with h5py.File(packed, "w") as file:
        file["images"] = np.zeros((len(contents.source), 8, 8), np.uint8)
        file["keys"] = np.array(contents.source.keys, dtype="S")
    for path in (run_folder / "checkpoint.h5", run_folder / "rounds.csv", packed):
        before = path.read_bytes()
        with pytest.raises(UsageError, match=path.name):
            page.report_stage(run_folder, str(path), data=str(packed), force=True)
        assert path.read_bytes() == before


def test_warnings_are_shown_by_round(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "collapsed"
    shutil.copytree(run_folder, folder)
    with (folder / "rounds.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert "problems" in rows[0] and len(rows) == ROUNDS + 1
    for row, problems in zip(
        rows, ["", "loss about ln K", "", "loss about ln K; few clusters predicted"], strict=True
    ):
        row["problems"] = problems
    with (folder / "rounds.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    contents = contents_of.read(folder)
    assert contents.problems == {"loss about ln K": [1, 3], "few clusters predicted": [3]}
    shown = re.sub(r"<[^>]+>", " ", page_of(contents))
    assert re.search(r"loss about ln K\s+1, 3\s+\S+\s+yes", shown)


def test_a_run_without_warnings_says_so(contents: Contents) -> None:
    assert "None: in no round" in page_of(replace(contents, problems={}))


def test_neighbouring_rounds_are_joined() -> None:
    assert page._spans([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


def test_rounds_are_in_order_beyond_a_thousand(run_folder: Path, tmp_path: Path) -> None:
    """labels-1000.h5 comes after labels-101.h5; labels that no round made are none of them."""
    folder = tmp_path / "long"
    shutil.copytree(run_folder, folder)
    header, *rows = (folder / "rounds.csv").read_text().splitlines()
    (folder / "rounds.csv").write_text("\n".join([header, *rows, *[rows[-1]] * 998]))
    for number in range(ROUNDS + 1, 1002):
        source = "labels-003.h5" if number == 1000 else "labels-001.h5"
        os.link(folder / source, folder / f"labels-{number:03d}.h5")
    shutil.copy(folder / "labels-001.h5", folder / "labels-0-mine.h5")
    traces = contents_of.read(folder).traces
    assert len(traces) == 1002
    residuals = [heads[0]["residual"][0] for heads in traces[1:]]
    assert residuals[999] == residuals[2] != residuals[0] == residuals[1000]
    assert np.all(np.delete(residuals, [1, 2, 999]) == residuals[0])


# ---- the numbers ------------------------------------------------------------


def test_confidence_is_the_softmax_at_the_label(
    write_logits: Callable[..., str], rng: np.random.Generator
) -> None:
    heads_NK = [rng.normal(size=(50, 3)) * 5, rng.normal(size=(50, 7)) + 1000]
    labels_TN = [rng.integers(0, logits.shape[1], 50) for logits in heads_NK]
    heads = [
        HeadLabels(labels_N, np.zeros(logits.shape[1]), {})
        for labels_N, logits in zip(labels_TN, heads_NK, strict=True)
    ]
    found = contents_of.confidences(write_logits(*heads_NK), Labels([], np.arange(50), heads))
    for confidence_N, logits_NK, labels_N in zip(found, heads_NK, labels_TN, strict=True):
        expected_NK = softmax(logits_NK.astype(np.float32).astype(np.float64), axis=1)
        np.testing.assert_allclose(confidence_N, expected_NK[np.arange(50), labels_N])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@given(st.integers(1, 10_000), st.integers(2, 200))
def test_a_spread_has_both_ends_and_even_steps(count: int, limit: int) -> None:
    chosen = spread(count, limit)
    assert len(chosen) == min(count, limit)
    assert chosen[0] == 0 and chosen[-1] == count - 1
    steps = np.diff(chosen)
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


@pytest.mark.parametrize("head", range(len(HEADS)))
def test_the_gallery_shows_each_cluster_as_it_is(contents: Contents, head: int) -> None:
    clusters = contents_of.clusters_of(contents, head, limit=100, images=4)
    labels_N, confidence_N = contents.labels.heads[head].labels_N, contents.confidence_TN[head]
    assert sorted(cluster.number for cluster in clusters) == list(range(HEADS[head]))
    assert contents.truth_N is not None
    for cluster in clusters:
        members = np.flatnonzero(labels_N == cluster.number)
        assert cluster.size == len(members) and len(cluster.rows) == min(4, len(members))
        assert set(cluster.rows) <= set(members.tolist())
        surest_first = confidence_N[cluster.rows]
        assert (np.diff(surest_first) <= 0).all()
        assert surest_first[0] == confidence_N[members].max()
        assert surest_first[-1] == confidence_N[members].min()
        assert cluster.confidence == pytest.approx(confidence_N[members].mean())
        classes = contents.truth_N[members].tolist()
        assert cluster.purity == max(map(classes.count, classes)) / len(classes)
        assert cluster.name is not None
        assert classes.count(int(cluster.name)) == max(map(classes.count, classes))
    assert [c.confidence for c in clusters] == sorted(c.confidence for c in clusters)[::-1]
    fewer = contents_of.clusters_of(contents, head, limit=3, images=4)
    assert [fewer[0], fewer[-1]] == [clusters[0], clusters[-1]] and len(fewer) == 3


def test_without_classes_there_is_no_purity(contents: Contents) -> None:
    unknown = replace(contents, truth_N=None)
    assert {c.purity for c in contents_of.clusters_of(unknown, 0, 100, 4)} == {None}
    assert figures.agreement(unknown) is None
    shown = data_of(page_of(unknown))
    assert all("name" not in image for image in shown["images"].values())


# ---- figures ----------------------------------------------------------------


def test_curves_are_those_of_the_run(contents: Contents) -> None:
    losses = contents.checkpoint.losses
    step, mean = figures.loss(contents).axes[0].lines[:2]
    np.testing.assert_array_equal(step.get_ydata(), losses)
    assert step.get_xdata()[-1] == pytest.approx(3.0)
    per_epoch = len(losses) // 3
    assert mean.get_ydata()[-1] == pytest.approx(losses[-per_epoch:].mean())
    churn = figures.relabel(contents).axes[0].lines[0].get_ydata()
    assert list(churn) == [row["churn"] for row in contents.rounds[1:]]
    agreement = figures.agreement(contents)
    assert agreement is not None
    nmi, ari = (line.get_ydata() for line in agreement.axes[0].lines)
    assert [list(nmi), list(ari)] == [
        [row[name] for row in contents.rounds] for name in ("nmi", "ari")
    ]


def test_residuals_have_a_line_a_round_and_head(contents: Contents) -> None:
    lines = figures.residuals(contents).axes[0].lines
    # And one of the tolerance.
    assert len(lines) == ROUNDS * len(HEADS) + 1
    for line, head in zip(lines[-1 - len(HEADS) : -1], contents.labels.heads, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), head.trace["residual"])


def test_a_solve_that_later_labels_carry_along_is_drawn_once(contents: Contents) -> None:
    """In the colour of its own round: `--relabel-heads cycle` labels one head a round."""
    first, second, *_ = contents.traces[1:]
    cycle = replace(contents, traces=[[], first, [first[0], second[1]]])
    lines = figures.residuals(cycle).axes[0].lines[:-1]
    assert len(lines) == len(first) + 1
    assert lines[0].get_color() == lines[1].get_color() != lines[-1].get_color()


@pytest.mark.parametrize("change", ["", "semicolons", "header"])
def test_damaged_rounds_are_named(change: str, run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    text = (folder / "rounds.csv").read_text()
    changed = {"semicolons": text.replace(",", ";"), "header": text.splitlines()[0]}
    (folder / "rounds.csv").write_text(changed.get(change, ""))
    with pytest.raises(BadData, match=r"rounds\.csv: damaged"):
        contents_of.read(folder)


def test_sizes_count_every_cluster_once(contents: Contents) -> None:
    for outline in figures.sizes(contents).axes[0].patches:
        x, y = outline.get_xy().T
        heights = dict(zip(x[:-1], y[1:], strict=True))
        assert sum(heights.values()) == pytest.approx(1)
        middle = sum(left * height for left, height in heights.items())
        # Sizes are N/K up to one image.
        assert middle == pytest.approx(1, abs=0.3)


def test_filters_are_the_layer_that_sees_the_colours(contents: Contents) -> None:
    model = contents.checkpoint.model
    kernels = figures.first_layer(model)
    np.testing.assert_array_equal(kernels, model["trunk.conv1.0.weight"])
    (sheet,) = figures.filters(contents).axes[0].images
    pixels = np.asarray(sheet.get_array())
    assert pixels.min() == 0 and pixels.max() == 1
    height, width = kernels.shape[2:]
    first = pixels[1 : 1 + height, 1 : 1 + width]
    kernel = kernels[0].transpose(1, 2, 0)
    np.testing.assert_allclose(
        first, (kernel - kernel.min()) / (kernel.max() - kernel.min()), atol=1e-6
    )


def test_pngs_are_written_whole_and_not_over_others(contents: Contents, tmp_path: Path) -> None:
    drawn = figures.draw(contents)
    assert set(drawn) == set(figures.FIGURES)
    figures.write_pngs(drawn, tmp_path)
    for name in drawn:
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.width > 600
    with pytest.raises(CannotCreate, match="--force"):
        figures.write_pngs(drawn, tmp_path)


# ---- the page ---------------------------------------------------------------


def test_the_page_fetches_nothing(text: str) -> None:
    elements = Elements(text)
    assert not {tag for tag, _ in elements.tags} & {"link", "iframe", "object", "embed", "base"}
    for _, attributes in elements.tags:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action", "poster"}:
                assert value is not None and value.startswith(("data:", "#"))
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    (policy,) = (
        attributes["content"]
        for _, attributes in elements.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'")


def test_thumbnails_are_the_images(contents: Contents, text: str) -> None:
    shown = data_of(text)["images"]
    assert len(shown) == IMAGES
    for row, image in shown.items():
        assert image["key"] == contents.labels.keys[int(row)]
        kind, encoded = image["url"].split(",")
        assert kind == "data:image/png;base64"
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(encoded))))
        expected = contents.source.image(int(contents.labels.index_N[int(row)]))
        np.testing.assert_array_equal(pixels, expected)


def test_images_are_found_by_name_among_others(
    run_folder: Path, contents: Contents, tmp_path: Path
) -> None:
    """In another order, and one more than when the run was made."""
    rows = contents.labels.index_N[::-1]
    keys, source = contents.labels.keys[::-1], contents.source
    assert source.truth_N is not None
    arrays = {
        "images": np.stack([np.zeros((8, 8, 3), np.uint8), *map(source.image, rows.tolist())]),
        "keys": np.array(["added", *keys], dtype="S"),
        "labels": np.array([0, *source.truth_N[rows]]),
    }
    with h5py.File(tmp_path / "more.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    found = contents_of.read(run_folder, str(tmp_path / "more.h5"))
    np.testing.assert_array_equal(found.truth_N, contents.truth_N)
    assert contents_of.gallery(found, 100, 12) == contents_of.gallery(contents, 100, 12)
    with h5py.File(tmp_path / "more.h5", "r+") as file:
        file["keys"][[2, 5]] = [b"renamed", b"too"]
    with pytest.raises(BadData, match=rf"'{keys[4]}' \(2 of {IMAGES} are missing\)"):
        contents_of.read(run_folder, str(tmp_path / "more.h5"))


def test_large_photos_become_small(contents: Contents, tmp_path: Path) -> None:
    Image.fromarray(np.full((300, 500, 3), 90, np.uint8)).save(tmp_path / "a.png")
    photo = replace(contents, source=open_source(str(tmp_path)))
    kind, encoded = contents_of.thumbnail(photo, 0).split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(BytesIO(base64.b64decode(encoded))).size == (64, 64)


def test_the_page_is_the_same_each_time(contents: Contents, text: str) -> None:
    assert page_of(contents) == text


def test_names_can_not_break_out_of_the_page(contents: Contents, text: str) -> None:
    bad = "</script><script>alert(1)</script><!--"
    keys = [f"{key}{bad}" for key in contents.labels.keys]
    hostile = page_of(replace(contents, labels=replace(contents.labels, keys=keys)))
    assert len(Elements(hostile).scripts) == len(Elements(text).scripts) == 2
    assert {image["key"] for image in data_of(hostile)["images"].values()} == set(keys)


def test_tables_tell_what_the_files_say(contents: Contents, text: str) -> None:
    for _, rows in contents.probes:
        for row in rows:
            assert f'<td class="number">{row["top1"]:.4f}'.rstrip("0").rstrip(".") in text
    for name, digest in contents.digests.items():
        assert f"<th>{name}</th><td>{digest}</td>" in text
    for row in contents.heads():
        assert f'<td class="number">{row["nmi"]:.4f}</td>' in text


def test_columns_that_no_probe_fills_are_left_out(contents: Contents) -> None:
    assert '<th class="number">lr</th>' not in page._probes(contents)
    name, rows = contents.probes[0]
    trained = rows[0] | {"method": "linear", "lr": 0.01, "epoch": 2, "loss": 1.5}
    assert '<th class="number">lr</th>' in page._probes(
        replace(contents, probes=[*contents.probes, (name, [trained])])
    )


# ---- what is refused --------------------------------------------------------


def test_unfinished_runs_and_other_images_are_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NoInput, match="no finished run"):
        contents_of.read(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(BadData, match="is not the run's 'digits/0000'"):
        contents_of.read(run_folder, str(tmp_path))
    output = tmp_path / "report.html"
    output.write_text("precious")
    with pytest.raises(CannotCreate, match="--force"):
        page.report_stage(run_folder, str(output))
    assert output.read_text() == "precious"


def test_figures_never_join_the_images(
    run_folder: Path, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, output = tmp_path / "photos", tmp_path / "report.html"
    photos.mkdir()
    source = replace(contents.source, spec=str(photos))
    monkeypatch.setattr(page, "read", lambda *asked: replace(contents, source=source))
    for inside in (photos, photos / "figures", photos / "a" / ".." / "figures"):
        with pytest.raises(UsageError, match="name a folder outside of"):
            page.report_stage(run_folder, str(output), png=inside)
    assert not list(photos.iterdir()) and not output.exists()


def test_figures_may_lie_in_a_folder_that_is_called_as_the_data(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    monkeypatch.setattr(figures, "FIGURES", {"loss": figures.FIGURES["loss"]})
    assert page.report_stage(run_folder, "report.html", png=Path("digits"))["figures"]
    assert [path.name for path in Path("digits").iterdir()] == ["loss.png"]


@pytest.mark.parametrize("folder", ["taken", "taken/figures"])
def test_a_folder_of_figures_that_can_not_be_made_is_no_missing_input(
    folder: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("precious")
    with pytest.raises(CannotCreate, match=f"{folder}: .*; choose another --png"):
        figures.write_pngs({}, tmp_path / folder)


def test_a_run_that_names_no_images_needs_them_named(run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    run = json.loads((copy / "run.json").read_text())
    assert run.pop("data") == "digits"
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(BadData, match="--data"):
        contents_of.read(copy)
    assert contents_of.read(copy, "digits").labels.keys


def test_trace_of_labels(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.png"
    figures.write_trace(str(run_folder / "labels.h5"), str(output))
    with Image.open(output) as image:
        image.load()
    with pytest.raises(BadData, match="random"):
        figures.write_trace(str(run_folder / "labels-000.h5"), str(tmp_path / "none.png"))
    heads = formats.read_labels(str(run_folder / "labels.h5")).heads
    drawn = figures.trace([head.trace for head in heads], 1e-4)
    for axes, name in zip(drawn.axes, ("iteration", "seconds"), strict=True):
        for line, head in zip(axes.lines[: len(heads)], heads, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), head.trace[name])
            np.testing.assert_array_equal(line.get_ydata(), head.trace["residual"])
    # Of heads that were not all solved for each keeps its number.
    (legend,) = figures.trace([{}, heads[1].trace], 1e-4).legends
    assert [text.get_text() for text in legend.get_texts()] == ["head 1", "tolerance"]


# ---- in a browser -----------------------------------------------------------

# Runs in the page after its own script; what it finds is the text of the last element.
PROBE = """
<script>
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
const cards = () => [...document.querySelectorAll(".cluster")];
const numbers = () => cards().map((card) => Number(card.dataset.cluster));
(async () => {
  const found = {};
  const images = [...document.images];
  await Promise.all(images.map((image) => image.decode()));
  found.loaded = images.filter((image) => image.naturalWidth > 0).length;
  found.headings = [...document.querySelectorAll(".cluster h3")].map((h) => h.textContent);
  found.heads = [0, 1].map((head) => { set("head", head); return cards().length; });
  found.orders = {};
  for (const option of document.getElementById("order").options) {
    set("order", option.value);
    found.orders[option.value] = numbers();
  }
  found.classes = {};
  for (const option of document.getElementById("class").options) {
    set("class", option.value);
    found.classes[option.value] = numbers();
  }
  set("class", "");
  set("find", "3");
  found.byNumber = numbers();
  set("find", "DIGITS/0000");
  found.byName = numbers();
  set("find", "no such image");
  found.nothing = numbers();
  found.count = document.getElementById("count").textContent;
  const results = document.createElement("pre");
  results.id = "results";
  results.textContent = JSON.stringify(found);
  document.body.append(results);
})();
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: install one to test the page in it")
def test_images_load_and_filters_work_in_a_browser(
    contents: Contents, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", f"{PROBE}</body>"))
    assert BROWSER is not None
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    options = ["--headless", "--disable-gpu", "--virtual-time-budget=120000", "--dump-dom"]
    command = [BROWSER, *options, *sandbox, f"--user-data-dir={tmp_path / 'profile'}"]
    # The browser's own time may be over before a busy machine has decoded the images.
    for _ in range(3):
        done = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, timeout=120
        )
        match = re.search(r'<pre id="results">(.*?)</pre>', done.stdout, re.DOTALL)
        if match:
            break
    assert match, done.stderr[-2000:]
    found = json.loads(match[1])
    first, second = (contents_of.clusters_of(contents, head, 100, 12) for head in (0, 1))
    assert found["loaded"] == sum(len(cluster.rows) for cluster in first)
    assert found["headings"][0].startswith(f"Cluster {first[0].number}{first[0].size} images")
    assert found["heads"] == list(HEADS)
    # The second head was chosen last.
    by = {
        "confidence": lambda c: -c.confidence,
        "unsure": lambda c: c.confidence,
        "purity": lambda c: -c.purity,
        "impure": lambda c: c.purity,
        "size": lambda c: -c.size,
        "number": lambda c: c.number,
    }
    assert set(found["orders"]) == set(by)
    for name, numbers in found["orders"].items():
        ordered = sorted(second, key=lambda c, key=by[name]: (key(c), c.number))
        assert numbers == [cluster.number for cluster in ordered]
    for name, numbers in found["classes"].items():
        assert numbers == [
            c.number for c in sorted(second, key=lambda c: c.number) if name in ("", c.name)
        ]
    assert found["byNumber"] == [3]
    row = contents.labels.keys.index("digits/0000")
    assert found["byName"] == [c.number for c in second if row in c.rows]
    assert found["nothing"] == [] and found["count"] == f"0 of {HEADS[1]} clusters"
