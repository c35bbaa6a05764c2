"""What a report shows, read from the folder of a run.

N images, n of one tile, K clusters of a head, T heads, S side of a thumbnail.
"""

from __future__ import annotations

import base64
import csv
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sela_cli import envelope, formats, metrics
from sela_cli.errors import BadData, NoInput, SelaError
from sela_cli.formats import Checkpoint, Labels
from sela_cli.images.batches import square
from sela_cli.images.sources import Source, open_source
from sela_cli.run_folder import own_files
from sela_cli.score_rows import ScoreRows
from sela_cli.scores import open_scores
from sela_cli.spread import spread
from sela_cli.tiles import map_spans

Trace = dict[str, np.ndarray]
_THUMBNAIL_SIDE = 64
# Below this side JPEG is no smaller than PNG, and blurs what there is.
_SMALL_SIDE = 32


@dataclass(frozen=True)
class Contents:
    """A finished run, as its files tell it. `traces[r][t]` is round r, head t.

    `problems`: what the run warned of, each with the rounds in which it was seen.
    """

    folder: Path
    settings: dict[str, Any]
    rounds: list[dict[str, float]]
    labels: Labels
    traces: list[list[Trace]]
    checkpoint: Checkpoint
    probes: list[tuple[str, list[dict[str, Any]]]]
    source: Source
    truth_N: np.ndarray | None
    confidence_TN: list[np.ndarray]
    digests: dict[str, str]
    problems: dict[str, list[int]]

    @property
    def steps_per_epoch(self) -> float:
        """Steps an epoch, as training counted them."""
        return self.checkpoint.step / self.checkpoint.epoch if self.checkpoint.epoch else 1.0

    def heads(self) -> list[dict[str, float]]:
        """One row a head: sizes, solve, agreement with the classes where there are some."""
        rows = []
        pairs = zip(self.labels.heads, self.confidence_TN, strict=True)
        for number, (head, confidence_N) in enumerate(pairs):
            row: dict[str, float] = {"head": number} | metrics.sizes(head)
            row["confidence"] = float(confidence_N.mean())
            if self.truth_N is not None:
                row |= metrics.agreement(head.labels_N, self.truth_N)
            rows.append(row)
        return rows


def read(folder: Path, data: str | None = None) -> Contents:
    """Read a finished run. `data` names its images if they are not where the run found them.

    They are found by their keys: others may have come since. Raises NoInput where the run
    is not finished or there are no images, BadData where one of its images is missing.
    """
    if not (folder / "rounds.csv").exists():
        raise NoInput(f"{folder}: no finished run in it", "give the folder of `sela run --out`")
    try:
        run = json.loads((folder / "run.json").read_text())
        spec, settings = data or run["data"], run["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if data is None:
            raise BadData(
                f"{folder / 'run.json'}: damaged ({error!r})", "name the images by --data"
            ) from error
        spec, settings = data, {}
    source = open_source(spec)
    labels = _found(source, formats.read_labels(str(folder / "labels.h5")))
    rounds, problems = _rounds(folder / "rounds.csv")
    of_rounds = [str(folder / f"labels-{number:03d}.h5") for number in range(len(rounds))]
    envelope.try_together(of_rounds)
    # Other files may lie beside a run's; probes of its networks belong to it.
    own = own_files(folder, "[!.]*.h5")
    probes = [path for path in folder.glob("probe*.h5") if path in own or _is_probe(path)]
    return Contents(
        folder=folder,
        settings=settings,
        rounds=rounds,
        labels=labels,
        traces=[_traces(path) for path in of_rounds],
        checkpoint=formats.read_checkpoint(str(folder / "checkpoint.h5")),
        probes=[(path.name, formats.read_probe(str(path))) for path in sorted(probes)],
        source=source,
        truth_N=None if source.truth_N is None else source.truth_N[labels.index_N],
        confidence_TN=confidences(str(folder / "logits.h5"), labels),
        digests={
            path.name: envelope.read_header(str(path)).digest for path in sorted({*own, *probes})
        },
        problems=problems,
    )


def _rounds(path: Path) -> tuple[list[dict[str, float]], dict[str, list[int]]]:
    """The numbers of each round, and the rounds in which each problem was seen."""
    problems: dict[str, list[int]] = {}
    rounds = []
    try:
        with path.open(newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream)):
                for problem in filter(None, row.pop("problems", "").split("; ")):
                    problems.setdefault(problem, []).append(number)
                rounds.append({name: float(cell) for name, cell in row.items()})
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise BadData(f"{path}: damaged ({error})", "copy it again") from error
    if not rounds or "epoch" not in rounds[0]:
        raise BadData(f"{path}: damaged (it has no rounds)", "copy it again")
    return rounds, problems


def read_files(folder: Path) -> list[Path]:
    """What a report reads of a run's folder, or might."""
    return [*own_files(folder, "*"), *folder.glob("probe*.h5")]


def _is_probe(path: Path) -> bool:
    try:
        return envelope.read_header(str(path)).kind == "probe"
    except SelaError:
        return False


def _found(source: Source, labels: Labels) -> Labels:
    """The labels, with the numbers that their images have in `source` now."""
    numbers = dict(zip(source.keys, range(len(source)), strict=True))
    missing = [key for key in labels.keys if key not in numbers]
    if missing:
        raise BadData(
            f"{source.spec}: among its images is not the run's '{missing[0]}' "
            f"({len(missing)} of {len(labels.keys)} are missing)",
            "name the images of the run by --data",
        )
    return replace(labels, index_N=np.array([numbers[key] for key in labels.keys]))


def _traces(path: str) -> list[Trace]:
    with envelope.open_file(path, "labels") as (file, _):
        traces = [f"trace/{head}" for head in range(len(file["labels"]))]
        return [envelope.datasets(path, file, trace) for trace in traces if trace in file]


def confidences(logits_path: str, labels: Labels) -> list[np.ndarray]:
    """Softmax probability of each image's label, p(y|x) = exp(l_y - logsumexp_k l_k); T of (N,)."""
    found = [np.empty(len(head.labels_N)) for head in labels.heads]

    def work(tiles: Iterator[tuple[int, Tensor]]) -> None:
        for start, tile_nS in tiles:
            some = slice(start, start + len(tile_nS))
            tiles_nK = torch.split(tile_nS, clusters, 1)
            for head, tile_nK, found_N in zip(labels.heads, tiles_nK, found, strict=True):
                labels_n1 = torch.from_numpy(head.labels_N[some, None].astype(np.int64))
                chosen_n = tile_nK.gather(1, labels_n1)[:, 0]
                found_N[some] = (chosen_n - tile_nK.logsumexp(1)).exp().numpy()

    with open_scores(logits_path) as scores:
        clusters = [matrix.shape[1] for matrix in scores.heads]
        # One read for all heads: of features each head would read them all.
        rows = ScoreRows(scores.side_by_side(), logits_path)
        deque(map_spans(rows, work), maxlen=0)
    return found


# ---- the gallery ------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """One cluster of the gallery. `rows`: some of its images, the surest first.

    `purity` is the share of `name`, the class most frequent in it; None without classes.
    """

    number: int
    size: int
    confidence: float
    purity: float | None
    name: str | None
    rows: list[int]


def clusters_of(contents: Contents, head: int, limit: int, images: int) -> list[Cluster]:
    """The clusters of a head, the most confident first, `images` of each.

    Of more than `limit` clusters, and of more than `images` images, those shown are evenly
    spread over the ranking: the worst are shown too.
    """
    labels_N = contents.labels.heads[head].labels_N
    confidence_N = contents.confidence_TN[head]
    usage_K = contents.labels.heads[head].usage_K
    ranked = np.split(np.lexsort((-confidence_N, labels_N)), np.cumsum(usage_K)[:-1])
    mean_K = np.array([confidence_N[rows].mean() if len(rows) else 0.0 for rows in ranked])
    order = np.argsort(-mean_K, kind="stable")
    found = []
    for number in order[spread(len(order), limit)].tolist():
        rows = ranked[number]
        purity = name = None
        if contents.truth_N is not None and len(rows):
            counts = np.bincount(contents.truth_N[rows])
            purity = float(counts.max() / len(rows))
            name = class_name(contents.source, int(counts.argmax()))
        found.append(
            Cluster(
                number,
                len(rows),
                float(mean_K[number]),
                purity,
                name,
                rows[spread(len(rows), images)].tolist(),
            )
        )
    return found


def class_name(source: Source, number: int) -> str:
    """A class as its data set calls it, else its number."""
    return source.classes[number] if source.classes else str(number)


def gallery(contents: Contents, limit: int, images: int) -> dict[str, Any]:
    """What the page's script draws, JSON values: clusters by head, and each image once."""
    heads = [
        clusters_of(contents, head, limit, images) for head in range(len(contents.labels.heads))
    ]
    rows = sorted({row for clusters in heads for cluster in clusters for row in cluster.rows})
    shown = {}
    for row in rows:
        shown[row] = {"key": contents.labels.keys[row], "url": thumbnail(contents, row)}
        if contents.truth_N is not None:
            shown[row]["name"] = class_name(contents.source, int(contents.truth_N[row]))
    confidences_of = [
        {row: round(float(confidence_N[row]), 3) for cluster in clusters for row in cluster.rows}
        for clusters, confidence_N in zip(heads, contents.confidence_TN, strict=True)
    ]
    return {
        "heads": [
            {
                "clusters": len(head.potentials_K),
                "shown": [asdict(cluster) for cluster in clusters],
                "confidence": confidence,
            }
            for head, clusters, confidence in zip(
                contents.labels.heads, heads, confidences_of, strict=True
            )
        ],
        "images": shown,
    }


def thumbnail(contents: Contents, row: int) -> str:
    """An image as a data URL, its centre square at most 64 pixels wide."""
    from PIL import Image

    pixels = contents.source.image(int(contents.labels.index_N[row]), _THUMBNAIL_SIDE)
    side = min(_THUMBNAIL_SIDE, *pixels.shape[:2])
    kind = "png" if side <= _SMALL_SIDE else "jpeg"
    stream = BytesIO()
    Image.fromarray(square(pixels, side)).save(stream, kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
