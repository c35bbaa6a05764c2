"""The report as one HTML page: everything is in it, nothing is fetched. See page.html."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sela_cli import __version__, outputs
from sela_cli.images.sources import is_folder
from sela_cli.report import figures
from sela_cli.report.contents import Contents, gallery, read, read_files

# The probes that every run with classes writes.
_WHEN = {"probe-000.h5": "before training", "probe.h5": "after training"}
_ABBREVIATIONS = ("nmi", "ami", "ari")


def report_stage(
    folder: Path,
    output: str,
    *,
    png: Path | None = None,
    data: str | None = None,
    clusters: int = 100,
    images: int = 12,
    force: bool = False,
) -> dict[str, Any]:
    """Write the page of the run in `folder`, and its figures into `png`; returns what was shown."""
    outputs.check_output(output, force, *map(str, read_files(folder)))
    contents = read(folder, data)
    outputs.check_output(output, force, contents.source.spec)
    if png and is_folder(contents.source.spec):
        outputs.check_outside(str(png), contents.source.spec)
    drawn = figures.draw(contents)
    if png:
        figures.write_pngs(drawn, png, force)
    shown = gallery(contents, clusters, images)
    text = page(contents, drawn, shown)
    with outputs.replacing(output, force) as partial:
        # A file name that is no UTF-8 is shown with question marks.
        partial.write_text(text, encoding="utf-8", errors="replace")
    return {
        "output": output,
        "images": len(contents.labels.keys),
        "thumbnails": len(shown["images"]),
        "clusters": [len(head["shown"]) for head in shown["heads"]],
        "figures": [str(png / f"{name}.png") for name in drawn] if png else [],
        "megabytes": len(text) / 1e6,
    }


def page(contents: Contents, drawn: dict[str, Figure], shown: dict[str, Any]) -> str:
    """The HTML text."""
    parts = {
        "title": escape(contents.folder.resolve().name),
        "version": __version__,
        "subtitle": escape(_subtitle(contents)),
        "cards": "".join(_card(name, value) for name, value in _cards(contents)),
        "figures": "".join(
            f'<figure id="figure-{name}"><figcaption>{escape(figures.FIGURES[name][1])}'
            f"</figcaption>{figures.svg(figure)}</figure>"
            for name, figure in drawn.items()
        ),
        "problems": _problems(contents),
        "heads": _table(contents.heads()),
        "probes": _probes(contents),
        "settings": _pairs(_flat(contents.settings)),
        "files": _pairs(contents.digests),
        # No text of the data may end the script.
        "gallery": json.dumps(shown).replace("<", "\\u003c"),
    }
    template = resources.files("sela_cli.report").joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _subtitle(contents: Contents) -> str:
    checkpoint = contents.checkpoint
    heads = ", ".join(map(str, checkpoint.heads))
    return (
        f"{contents.source.spec}: {len(contents.labels.keys):,} images, {checkpoint.arch} at "
        f"{checkpoint.image_size} pixels, heads of {heads} clusters"
    )


def _cards(contents: Contents) -> list[tuple[str, str]]:
    last = contents.rounds[-1]
    cards = [
        ("epochs", f"{contents.checkpoint.epoch:g}"),
        ("rounds", f"{len(contents.rounds) - 1}"),
        ("loss after the last round", _number(last["loss"])),
    ]
    if len(contents.rounds) > 1:
        cards.append(("labels changed by the last round", f"{last['churn']:.1%}"))
    if "nmi" in last:
        cards.append(("NMI, mean of the heads", f"{last['nmi']:.3f}"))
    cards += [
        (f"kNN accuracy, {_WHEN[name]}", f"{row['top1']:.1%}")
        for name, rows in contents.probes
        for row in rows
        if name in _WHEN and row["method"] == "knn"
    ]
    return cards


def _card(name: str, value: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _problems(contents: Contents) -> str:
    if not contents.problems:
        return "<p>None: in no round did the run look as if it would learn nothing.</p>"
    rows = [
        {
            "seen": problem,
            "in rounds": _spans(numbers),
            "from epoch": contents.rounds[numbers[0]]["epoch"],
            "still in the last": "yes" if numbers[-1] == len(contents.rounds) - 1 else "no",
        }
        for problem, numbers in contents.problems.items()
    ]
    return _table(rows)


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours joined: `1-3, 7`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def _probes(contents: Contents) -> str:
    names = ("layer", "method", "setting", "split", "n", "top1", "top5", "epoch", "lr", "loss")
    rows = [
        {"file": file} | {name: row[name] for name in names}
        for file, measured in contents.probes
        for row in measured
    ]
    for row in rows:
        # -1 stands for none: kNN is not trained.
        row["epoch"] = math.nan if row["epoch"] < 0 else row["epoch"]
    # Where all is kNN, nothing was trained.
    blank = {name for name in names if all(_number(row[name]) == "" for row in rows)}
    rows = [{name: row[name] for name in row if name not in blank} for row in rows]
    hint = "<p>None here. <code>sela probe</code> measures the features by known classes.</p>"
    return _table(rows) if rows else hint


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns are those of the first row; what is text there is set to the left."""
    kinds = ["text" if isinstance(value, str) else "number" for value in rows[0].values()]
    names = [name.upper() if name in _ABBREVIATIONS else name for name in rows[0]]
    heading = "".join(
        f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, names, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{_number(value)}</td>'
            for kind, value in zip(kinds, row.values(), strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    if math.isnan(value):
        return ""
    # Whole numbers, and rates too small for four decimals, as they are.
    return f"{value:.4f}" if abs(value) >= 5e-5 and value % 1 else f"{value:g}"


def _pairs(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="pairs">{"".join(rows)}</table>'


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `recipe.lr`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
