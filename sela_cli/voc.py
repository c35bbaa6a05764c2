"""PASCAL VOC 2007: its annotations, and average precision by kept libraries.

N images, C classes, n objects of an image. Boxes are x1, y1, x2, y2: edges, in
pixels from 0, so that the whole of an image of W pixels is 0 to W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from sela_cli.errors import BadData, UsageError
from sela_cli.images.sources import Source, open_source
from sela_cli.spread import spread

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Recalls at which detection precision is read: 11 points, and the area, to 0.001. Quotients, as
# recalls are: np.linspace has a seventh tenth that 7 of 10 do not reach.
_RECALLS = np.arange(1001) / 1000
_ELEVENTH = 100


@dataclass(frozen=True)
class Objects:
    """What an image shows. Difficult objects are neither asked for nor held against."""

    boxes_n4: np.ndarray
    classes_n: np.ndarray
    difficult_n: np.ndarray


def open_voc(
    spec: str, download: bool = False, limit: int | None = None
) -> tuple[Source, list[Objects]]:
    """The images of `voc2007:ROOT[@SPLIT]`, at most `limit` of them, and what each shows.

    Raises UsageError for another data set, BadData naming an annotation that can't be read.
    """
    name, _, root = spec.partition(":")
    if name != "voc2007":
        raise UsageError(f"{spec} has no boxes", "fine-tuning takes voc2007:ROOT")
    source = open_source(spec, download)
    if limit is not None and limit < len(source):
        source = source.part(spread(len(source), limit))
    split = source.keys[0].partition("/")[0]
    folder = Path(root.removesuffix(f"@{split}"), "VOCdevkit", "VOC2007", "Annotations")
    return source, [_objects(folder / f"{Path(key).stem}.xml") for key in source.keys]


def _objects(path: Path) -> Objects:
    try:
        items = list(ElementTree.parse(path).getroot().iter("object"))
        # VOC counts pixels from 1 and the last one in: from 0, a box ends where that one does.
        boxes = [
            [float(item.findtext(f"bndbox/{side}") or "") - shift for side, shift in _SIDES]
            for item in items
        ]
        for x1, y1, x2, y2 in boxes:
            if not (x1 < x2 and y1 < y2):
                raise ValueError(f"a box from {x1:g}, {y1:g} to {x2:g}, {y2:g}")
        classes = [CLASSES.index(item.findtext("name") or "") for item in items]
        difficult = [item.findtext("difficult") == "1" for item in items]
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise BadData(f"{path}: not a readable VOC annotation ({error})") from error
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(difficult, bool),
    )


_SIDES = (("xmin", 1), ("ymin", 1), ("xmax", 0), ("ymax", 0))


def presence(objects: Sequence[Objects]) -> np.ndarray:
    """(N, C): 1 where a class is shown, 0 where not, -1 where only difficult objects show it."""
    shown_NC = np.zeros((len(objects), len(CLASSES)), np.int64)
    for row, each in enumerate(objects):
        shown_NC[row, each.classes_n[each.difficult_n]] = -1
        shown_NC[row, each.classes_n[~each.difficult_n]] = 1
    return shown_NC


def classification_precision(scores_NC: np.ndarray, shown_NC: np.ndarray) -> list[dict[str, Any]]:
    """Average precision of every class over the images, one row a class.

    `ap11` is the mean over recalls 0, 0.1, .. 1 of the best precision at that recall or
    beyond (VOC 2007), `ap` scikit-learn's area.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    rows = []
    for number, name in enumerate(CLASSES):
        counted = shown_NC[:, number] >= 0
        truth, scores = shown_NC[counted, number], scores_NC[counted, number]
        eleven = area = float("nan")
        if truth.any():
            precision, recall, _ = precision_recall_curve(truth, scores)
            # The last point, recall 0, is scikit-learn's own and no image's.
            precision, recall = precision[:-1], recall[:-1]
            points = np.arange(11) / 10
            eleven = float(np.mean([precision[recall >= point].max() for point in points]))
            area = float(average_precision_score(truth, scores))
        rows.append({"class": name, "positives": int(truth.sum()), "ap11": eleven, "ap": area})
    return rows


def detection_precision(
    found: Sequence[Mapping[str, Tensor]], objects: Sequence[Objects]
) -> list[dict[str, Any]]:
    """Average precision of every class over the boxes at IoU 0.5, one row a class.

    `found`: boxes, scores and labels (1..C) of each image, as torchvision's detectors give
    them. Computed by torchmetrics; difficult boxes are COCO's crowd, at most 100 boxes of
    an image count, and `ap` is the mean precision at 1,001 recalls.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        iou_thresholds=[0.5], rec_thresholds=_RECALLS.tolist(), extended_summary=True
    )
    metric.warn_on_many_detections = False
    metric.update([dict(each) for each in found], [_coco(each) for each in objects])
    result = metric.compute()
    # Axes: IoU threshold, recall, class, range of areas (the first is all), detections.
    precision = result["precision"][0, :, :, 0, -1].numpy().astype(np.float64)
    places = {int(label): place for place, label in enumerate(result["classes"].reshape(-1))}
    rows = []
    for number, name in enumerate(CLASSES):
        positives = sum(int((o.classes_n[~o.difficult_n] == number).sum()) for o in objects)
        eleven = area = float("nan")
        if positives:
            curve = precision[:, places[number + 1]]
            eleven, area = float(curve[::_ELEVENTH].mean()), float(curve.mean())
        rows.append({"class": name, "positives": positives, "ap11": eleven, "ap": area})
    return rows


def _coco(objects: Objects) -> dict[str, Tensor]:
    return {
        "boxes": torch.from_numpy(objects.boxes_n4),
        "labels": torch.from_numpy(objects.classes_n + 1),
        "iscrowd": torch.from_numpy(objects.difficult_n.astype(np.int64)),
    }


def mean_precision(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the classes that have positives."""
    kept = [row for row in rows if row["positives"]]
    if not kept:
        return {"map11": float("nan"), "map": float("nan")}
    return {f"m{name}": float(np.mean([row[name] for row in kept])) for name in ("ap11", "ap")}
