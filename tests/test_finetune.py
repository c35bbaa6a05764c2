"""Fine-tuning on a tiny VOC tree, and average precision against its definition."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import box_iou
from typer.testing import CliRunner

from sela_cli import envelope, finetune, formats, interrupt, voc
from sela_cli.cli import app
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, NoInput, StoppedEarly, UsageError
from sela_cli.finetune import FinetuneRecipe, classifier, detector, finetune_stage
from sela_cli.formats import Checkpoint
from sela_cli.networks import Network, build
from sela_cli.voc import CLASSES, Objects, classification_precision, detection_precision

MODES = ("train", "test")
COLOURS = {"bird": (230, 30, 30), "cat": (30, 230, 30), "person": (30, 30, 230)}


def write_voc(root: Path) -> Path:
    """18 images of one square each, whose colour is its class: 12 trainval and 6 test."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(18):
        name = list(COLOURS)[number % 3]
        pixels = rng.integers(90, 110, (48, 64, 3), np.uint8)
        left, top = 8 + number, 6
        pixels[top : top + 30, left : left + 36] = COLOURS[name]
        Image.fromarray(pixels).save(base / "JPEGImages" / f"{number:06d}.jpg", quality=95)
        box = f"<xmin>{left + 1}</xmin><ymin>7</ymin><xmax>{left + 36}</xmax><ymax>36</ymax>"
        items = (
            f"<object><name>{name}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
        )
        if number == 0:
            box = "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax>"
            items += (
                f"<object><name>sofa</name><difficult>1</difficult><bndbox>{box}</bndbox></object>"
            )
        (base / "Annotations" / f"{number:06d}.xml").write_text(f"<annotation>{items}</annotation>")
    for split, numbers in (("trainval", range(12)), ("test", range(12, 18))):
        lines = "\n".join(f"{number:06d}" for number in numbers)
        (base / f"ImageSets/Main/{split}.txt").write_text(lines)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"))


def stage(
    tree: Path,
    output: Path,
    network: Network,
    progress: finetune.Progress = lambda done, total, note: None,
    force: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    train, test = voc.open_voc(f"voc2007:{tree}"), voc.open_voc(f"voc2007:{tree}@test")
    recipe, provenance = FinetuneRecipe(**options), Provenance("test", {})
    return finetune_stage(
        train, test, network, str(output), recipe, provenance, force=force, progress=progress
    )


# ---- annotations ----------------------------------------------------------------


def test_annotations_count_pixels_from_zero(tree: Path) -> None:
    source, objects = voc.open_voc(f"voc2007:{tree}")
    assert len(source) == len(objects) == 12
    np.testing.assert_array_equal(objects[3].boxes_n4, [[11, 6, 47, 36]])
    assert [CLASSES[number] for number in objects[0].classes_n] == ["bird", "sofa"]
    assert objects[0].difficult_n.tolist() == [False, True]
    shown_NC = voc.presence(objects)
    assert shown_NC[0, CLASSES.index("sofa")] == -1 and shown_NC[0, CLASSES.index("bird")] == 1
    assert (shown_NC == 1).sum() == 12 and (shown_NC == -1).sum() == 1


def test_limit_keeps_annotations_with_their_images(tree: Path) -> None:
    source, objects = voc.open_voc(f"voc2007:{tree}")
    part, kept = voc.open_voc(f"voc2007:{tree}", limit=3)
    rows = [source.keys.index(key) for key in part.keys]
    assert len(rows) == len(kept) == 3 and (rows[0], rows[-1]) == (0, 11)
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(part.image(number), source.image(row))
        np.testing.assert_array_equal(kept[number].boxes_n4, objects[row].boxes_n4)


@pytest.mark.parametrize(
    "text", ["<annotation>", "<a><object><name>unicorn</name></object></a>", "<a><object/></a>"]
)
def test_a_bad_annotation_is_named(text: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/Annotations/000004.xml").write_text(text)
    with pytest.raises(BadData, match=r"000004\.xml"):
        voc.open_voc(f"voc2007:{tmp_path}")


def test_a_box_without_an_inside_is_named(tmp_path: Path) -> None:
    write_voc(tmp_path)
    path = tmp_path / "VOCdevkit/VOC2007/Annotations/000004.xml"
    path.write_text(re.sub(r"<xmax>\d+</xmax>", "<xmax>1</xmax>", path.read_text()))
    with pytest.raises(BadData, match=r"000004\.xml.*a box from"):
        voc.open_voc(f"voc2007:{tmp_path}")


def test_other_data_has_no_boxes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="voc2007"):
        voc.open_voc("digits")
    with pytest.raises(NoInput):
        voc.open_voc(f"voc2007:{tmp_path}")


# ---- average precision ----------------------------------------------------------


def eleven_points(hits: np.ndarray, positives: int) -> float:
    """VOC 2007's definition for hits in the order of falling score."""
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    recall = np.cumsum(hits) / positives
    best = [precision[recall >= point - 1e-12] for point in np.linspace(0, 1, 11)]
    return float(np.mean([part.max() if len(part) else 0.0 for part in best]))


def test_classification_precision_is_the_definition() -> None:
    rng = np.random.default_rng(0)
    shown_NC = rng.integers(-1, 2, (60, 20))
    scores_NC = shown_NC + 2 * rng.normal(size=(60, 20))
    for number, row in enumerate(classification_precision(scores_NC, shown_NC)):
        counted = shown_NC[:, number] >= 0
        order = np.argsort(-scores_NC[counted, number])
        hits = shown_NC[counted, number][order]
        assert row["positives"] == hits.sum()
        assert row["ap11"] == pytest.approx(eleven_points(hits, hits.sum()))
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        assert row["ap"] == pytest.approx(precision[hits == 1].mean())


def test_eleven_points_of_classification_are_those_of_torchmetrics() -> None:
    """An image is one box, which is found for every class with that class's score."""
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(1)
    shown_NC = rng.integers(0, 2, (50, 20))
    scores_NC = (shown_NC + rng.normal(size=(50, 20))).astype(np.float32)
    box = np.array([[0, 0, 8, 8]], np.float32)
    found, objects = [], []
    for shown_C, scores_C in zip(shown_NC, scores_NC, strict=True):
        boxes, labels = torch.from_numpy(np.repeat(box, 20, 0)), torch.arange(1, 21)
        found.append({"boxes": boxes, "labels": labels, "scores": torch.from_numpy(scores_C)})
        there = np.flatnonzero(shown_C)
        objects.append(Objects(np.repeat(box, len(there), 0), there, np.zeros(len(there), bool)))
    theirs = detection_precision(found, objects)
    for row, other in zip(classification_precision(scores_NC, shown_NC), theirs, strict=True):
        assert row["positives"] == other["positives"]
        assert row["ap11"] == pytest.approx(other["ap11"], abs=1e-6)


def test_a_class_that_is_never_shown_has_no_precision() -> None:
    rows = classification_precision(np.zeros((4, 20)), np.zeros((4, 20), int))
    assert all(np.isnan(row["ap"]) and row["positives"] == 0 for row in rows)
    assert np.isnan(voc.mean_precision(rows)["map"])


def random_boxes(rng: np.random.Generator, count: int) -> Tensor:
    corners = rng.uniform(0, 60, (count, 2))
    return torch.from_numpy(np.hstack([corners, corners + rng.uniform(20, 40, (count, 2))])).float()


def random_detections(seed: int) -> tuple[list[dict[str, Tensor]], list[Objects]]:
    """Objects of two classes in 30 images, found roughly, with others that are not there."""
    rng = np.random.default_rng(seed)
    found, objects = [], []
    for _ in range(30):
        boxes = random_boxes(rng, 2)
        classes = rng.integers(0, 2, 2)
        objects.append(Objects(boxes.numpy(), classes, np.zeros(2, bool)))
        noisy = boxes + torch.from_numpy(rng.normal(0, 5, (2, 4))).float()
        labels = torch.from_numpy(np.r_[classes, rng.integers(0, 2, 3)] + 1)
        scores = torch.from_numpy(rng.uniform(0, 1, 5)).float()
        found.append(
            {"boxes": torch.cat([noisy, random_boxes(rng, 3)]), "labels": labels, "scores": scores}
        )
    return found, objects


def hits_of_class(
    found: list[dict[str, Tensor]], objects: list[Objects], number: int
) -> tuple[np.ndarray, int]:
    """Each object is found once, by the best-scoring box that overlaps it by half."""
    rows = []
    for image, each in zip(found, objects, strict=True):
        boxes = torch.from_numpy(each.boxes_n4[each.classes_n == number])
        taken: set[int] = set()
        kept = image["labels"] == number + 1
        for place in image["scores"][kept].argsort(descending=True):
            overlaps = box_iou(image["boxes"][kept][place][None], boxes)[0]
            free = [i for i in range(len(boxes)) if i not in taken and overlaps[i] >= 0.5]
            best = max(free, key=lambda i: float(overlaps[i]), default=None)
            taken |= set() if best is None else {best}
            rows.append((float(image["scores"][kept][place]), best is not None))
    positives = sum(int((each.classes_n == number).sum()) for each in objects)
    return np.array([hit for _, hit in sorted(rows, reverse=True)], float), positives


def test_detection_precision_is_the_definition() -> None:
    pytest.importorskip("torchmetrics")
    found, objects = random_detections(0)
    rows = detection_precision(found, objects)
    for number in (0, 1):
        hits, positives = hits_of_class(found, objects, number)
        assert rows[number]["positives"] == positives
        assert 0.1 < rows[number]["ap11"] < 0.95
        assert rows[number]["ap11"] == pytest.approx(eleven_points(hits, positives), abs=1e-6)
    assert all(row["positives"] == 0 and np.isnan(row["ap"]) for row in rows[2:])


@pytest.mark.parametrize("count", [10, 20, 100])
def test_a_recall_of_seven_tenths_reaches_the_seventh(count: int) -> None:
    """No false box: precision is 1 as far as recall goes, at 8 of the 11 points."""
    pytest.importorskip("torchmetrics")
    boxes_n4 = np.array([[10 * n, 0, 10 * n + 8, 8] for n in range(count)], np.float32)
    objects = [Objects(boxes_n4, np.zeros(count, int), np.zeros(count, bool))]
    some = torch.from_numpy(boxes_n4[: count * 7 // 10])
    labels, scores = torch.ones(len(some), dtype=torch.int64), torch.linspace(1, 0.5, len(some))
    found = detection_precision([{"boxes": some, "labels": labels, "scores": scores}], objects)
    assert found[0]["ap11"] == pytest.approx(8 / 11)
    assert found[0]["ap"] == pytest.approx(701 / 1001)


def test_difficult_objects_count_neither_way() -> None:
    pytest.importorskip("torchmetrics")
    found, objects = random_detections(1)
    plain = detection_precision(found, objects)
    far = np.array([[200, 200, 240, 240]], np.float32)
    hard = [
        Objects(np.vstack([o.boxes_n4, far]), np.r_[o.classes_n, 0], np.r_[o.difficult_n, True])
        for o in objects
    ]
    assert detection_precision(found, hard)[0] == plain[0]
    for image in found:
        image["boxes"] = torch.cat([image["boxes"], torch.from_numpy(far)])
        image["labels"] = torch.cat([image["labels"], torch.tensor([1])])
        image["scores"] = torch.cat([image["scores"], torch.tensor([2.0])])
    assert detection_precision(found, hard)[0] == plain[0]
    assert detection_precision(found, objects)[0]["ap"] < plain[0]["ap"]


# ---- what is trained ------------------------------------------------------------


def trained_names(module: nn.Module) -> set[str]:
    """First names of what has gradients, `fc6` of `0.fc6.1.weight`."""
    names = [n for n, parameter in module.named_parameters() if parameter.requires_grad]
    return {next(part for part in name.split(".") if not part.isdigit()) for name in names}


def test_fc_trains_fully_connected_layers_only() -> None:
    model = classifier(build("alexnet-small", 32, [2], seed=0), "fc")
    assert trained_names(model) == {"fc6", "fc7", "weight", "bias"}
    model = classifier(build("resnet18", 32, [2], seed=0), "fc")
    assert trained_names(model) == {"weight", "bias"}
    model = classifier(build("alexnet-small", 32, [2], seed=0), "all")
    assert {"conv1", "conv5", "fc7"} < trained_names(model)


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18"])
def test_a_frozen_trunk_has_no_gradients_in_a_detector(arch: str) -> None:
    network = build(arch, 32, [2], seed=0)
    model = detector(network, "fc", 64)
    frozen = {"conv1", "conv5", "layer1", "layer4"}
    assert not {name for name in frozen if f"{name}." in " ".join(_trained(model))}
    assert any("fc6" in name or "roi_heads" in name for name in _trained(model))
    whole = " ".join(_trained(detector(build(arch, 32, [2], seed=0), "all", 64)))
    assert "body.layer1." in whole if arch == "resnet18" else "backbone.0." in whole
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def _trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def test_batchnorm_keeps_its_statistics(tree: Path, tmp_path: Path) -> None:
    network = build("alexnet-small", 32, [2], seed=0)
    before = {n: b.clone() for n, b in network.named_buffers()}
    weight = network.trunk.get_parameter("conv1.0.weight").clone()
    options = {"task": "classification", "iterations": 2, "batch_size": 4, "lr": 0.01}
    stage(tree, tmp_path / "voc.h5", network, **options)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert not torch.equal(network.trunk.get_parameter("conv1.0.weight"), weight)


# ---- the stage ------------------------------------------------------------------


@pytest.mark.slow
def test_classification_learns_colours(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "voc.h5"
    network = build("resnet18", 72, [2], seed=0)
    options = {"part": "all", "iterations": 30, "batch_size": 6, "lr": 0.05}
    rows = stage(tree, output, network, task="classification", **options)
    assert formats.read_precisions(str(output))[7] == rows[7]
    kept = [row for row in rows if row["positives"]]
    assert {row["class"] for row in kept} == set(COLOURS)
    assert voc.mean_precision(rows)["map"] > 0.9
    with pytest.raises(CannotCreate, match="--force"):
        stage(tree, output, network, task="classification", iterations=1)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size"), [("alexnet-small", 32), ("resnet18", 224)])
def test_detection_runs_and_repeats(arch: str, size: int, tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    digests = set()
    for number in range(2):
        output = tmp_path / f"{number}.h5"
        torch.manual_seed(number)
        options = {"iterations": 1, "batch_size": 2, "min_size": 64, "lr": 1e-3}
        rows = stage(tree, output, build(arch, size, [2], seed=0), task="detection", **options)
        assert sum(row["positives"] for row in rows) == 6
        digests.add(envelope.read_header(str(output)).digest)
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "recipe"),
    [
        ("alexnet-small", 32, {"iterations": 200, "batch_size": 4, "lr": 0.02}),
        ("resnet18", 224, {"iterations": 60, "batch_size": 6, "lr": 0.002}),
    ],
)
def test_detection_learns_squares(
    arch: str,
    size: int,
    recipe: dict[str, Any],
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torchmetrics")
    # A tenth of the boxes that are looked at, and of the time.
    counts = {f"rpn_{when}_nms_top_n_{mode}": 100 for when in ("pre", "post") for mode in MODES}
    fewer = partial(detection.FasterRCNN, box_batch_size_per_image=32, **counts)
    monkeypatch.setattr(detection, "FasterRCNN", fewer)
    network = build(arch, size, [2], seed=0)
    rows = stage(tree, tmp_path / "voc.h5", network, task="detection", min_size=64, **recipe)
    assert {row["class"] for row in rows if row["positives"]} == set(COLOURS)
    assert voc.mean_precision(rows)["map"] > 0.5


@pytest.mark.parametrize(
    "task",
    ["classification", pytest.param("detection", marks=pytest.mark.slow)],
)
def test_stopped_after_every_step_it_goes_on_and_gives_the_same_digest(
    task: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task == "detection":
        pytest.importorskip("torchmetrics")
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    options: dict[str, Any] = {"task": task, "iterations": 3, "batch_size": 6, "lr": 0.001}
    options["min_size"] = 64

    asked: list[bool] = []
    monkeypatch.setattr(interrupt, "requested", lambda: bool(asked))

    def call(path: Path, stop: bool = False) -> None:
        """`stop`: asked for in the first step that is made."""
        asked.clear()
        network = build("alexnet-small", 32, [2], seed=0)
        progress = lambda done, total, note: asked.extend([True] * (stop and "loss" in note))  # noqa: E731
        stage(tree, path, network, progress, **options)

    call(whole)
    for told in ("step 1 of 3", "step 2 of 3", "test images"):
        with pytest.raises(StoppedEarly, match=told):
            call(parts, stop=True)
        assert [path.name for path in tmp_path.glob("parts*")] == ["parts.h5.unfinished"]
    call(parts)
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.h5"]
    assert envelope.read_header(str(parts)).digest == envelope.read_header(str(whole)).digest


def test_the_state_of_another_call_is_not_taken_up(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, steps = tmp_path / "out.h5", 0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal steps
        steps += "loss" in note

    def call(**other: Any) -> int:
        """The steps that were made."""
        nonlocal steps
        steps = 0
        output.unlink(missing_ok=True)
        options = {"task": "classification", "iterations": 2, "batch_size": 6, "lr": 0.001}
        stage(tree, output, build("alexnet-small", 32, [2], seed=0), progress, **options | other)
        return steps

    def stopped() -> None:
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly, match="step 1 of 2"):
            patch.setattr(interrupt, "requested", lambda: steps > 0)
            call()

    stopped()
    assert call() == 1
    for other in ({"lr": 0.002}, {"part": "fc"}, {"seed": 1}):
        stopped()
        with pytest.raises(CannotCreate, match=f"differs in {next(iter(other))};"):
            call(**other)
        assert call(**other, force=True) == 2


@pytest.mark.parametrize("content", ["no HDF5", "no model"])
def test_a_damaged_state_is_named(
    content: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, left = tmp_path / "out.h5", tmp_path / "out.h5.unfinished"
    noted: list[str] = []

    def call() -> None:
        network = build("alexnet-small", 32, [2], seed=0)
        options = {"task": "classification", "iterations": 2, "batch_size": 6, "lr": 0.001}
        stage(tree, output, network, lambda done, total, note: noted.append(note), **options)

    with monkeypatch.context() as patch, pytest.raises(StoppedEarly):
        patch.setattr(interrupt, "requested", lambda: any("loss" in note for note in noted))
        call()
    if content == "no model":
        with h5py.File(left, "r+") as file:
            del file["model/1.bias"]
    else:
        left.write_text(content)
    with pytest.raises(BadData, match=r"out\.h5\.unfinished"):
        call()
    assert not output.exists()


def test_mirrored_boxes_follow_their_image(tree: Path) -> None:
    source, objects = voc.open_voc(f"voc2007:{tree}")
    for mirrored in (False, True):
        image, target = finetune._example(source, objects, 0, mirrored)
        left, top, right, bottom = target["boxes"][0].int().tolist()
        # The first and last columns and rows of the box show the object, those beside it do not.
        columns, rows = image[0, top + 9], image[0, :, left + 9]
        for line, first, last in ((columns, left, right), (rows, top, bottom)):
            assert line[[first, last - 1]].min() > 0.6 > line[[first - 1, last]].max()
        inside = image[:, top + 3 : bottom - 3, left + 3 : right - 3].mean((1, 2))
        assert inside[0] > 0.8 and inside[1] < 0.3 and len(target["boxes"]) == 1
        assert image[:, :, : left - 3].std() < 0.1 and image[:, :, right + 3 :].std() < 0.1


@pytest.mark.parametrize(
    "options", [{"task": "segmentation"}, {"task": "detection", "part": "fc6"}, {"lr": 0.0}]
)
def test_options_without_meaning(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FinetuneRecipe(**{"task": "classification"} | options).check()


@pytest.mark.parametrize("split", ["", "@trainval"])
def test_the_test_split_is_that_of_a_folder_with_any_name(
    split: str, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "me@lab").symlink_to(tree)
    checkpoint, data = tmp_path / "c.h5", f"voc2007:{tmp_path}/me@lab{split}"
    network = build("alexnet-small", 32, [2], seed=0)
    state = Checkpoint(network.arrays(), {}, network.arch, 32, [2], 0, 0.0, {})
    formats.write_checkpoint(str(checkpoint), state, Provenance("test", {}))
    line = f"finetune --data {data} -c {checkpoint} --task classification -o voc.h5 -n --json"
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert (shown["train"], shown["test"]) == (12, 6)


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_training_on_the_test_images_is_warned_of(split: str, tree: Path, tmp_path: Path) -> None:
    network = build("alexnet-small", 32, [2], seed=0)
    state = Checkpoint(network.arrays(), {}, network.arch, 32, [2], 0, 0.0, {})
    formats.write_checkpoint(str(tmp_path / "c.h5"), state, Provenance("test", {}))
    line = f"finetune --data voc2007:{tree}@{split} -c {tmp_path}/c.h5 -o {tmp_path}/voc.h5"
    line += " --task classification --dry-run"
    done = CliRunner().invoke(app, line.split(), catch_exceptions=False)
    told = f"warning: voc2007:{tree}@test: trained and tested on the same images" in done.stderr
    assert (done.exit_code, told) == (0, split == "test")


@pytest.mark.parametrize(
    ("task", "defaults"),
    [("classification", (20_000, 16, 0.003)), ("detection", (20_000, 4, 0.005))],
)
def test_what_is_not_given_has_the_default_that_help_tells(
    task: str, defaults: tuple[int, int, float]
) -> None:
    assert FinetuneRecipe(task).resolved() == defaults
    for place, (name, value) in enumerate({"iterations": 7, "batch_size": 9, "lr": 0.5}.items()):
        resolved = FinetuneRecipe(task, **{name: value}).resolved()  # type: ignore[arg-type]
        assert resolved == (*defaults[:place], value, *defaults[place + 1 :])


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_from_the_command_line(task: str, tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    network = build("alexnet-small", 32, [2], seed=0)
    state = Checkpoint(network.arrays(), {}, network.arch, 32, [2], 0, 0.0, {})
    formats.write_checkpoint(str(tmp_path / "c.h5"), state, Provenance("test", {}))
    line = ["finetune", "--data", f"voc2007:{tree}", "-c", tmp_path / "c.h5", "--task", task]
    line += ["-o", tmp_path / "voc.h5", "--train", "fc", "--iterations", 1, "--batch-size", 2]
    line += ["--device", "cpu", "--json", "-q"]
    if task == "detection":
        line += ["--min-size", 64]
    for extra in (["--dry-run"], []):
        done = CliRunner().invoke(app, [*map(str, line), *extra], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        shown = json.loads(done.stdout)
        assert (shown["train"], shown["test"]) == (12, 6)
        assert (tmp_path / "voc.h5").exists() == (not extra)
    assert len(shown["results"]) == 20
