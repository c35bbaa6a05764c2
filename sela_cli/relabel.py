"""One head labelled anew, the others kept: the reference's relabelling for small data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from sela_cli import formats, job
from sela_cli.errors import BadData, UsageError
from sela_cli.formats import Labels
from sela_cli.labels import LabelSettings, label, provenance_of
from sela_cli.scores import open_scores


def relabel_stage(
    spec: str,
    output: str,
    settings: LabelSettings,
    head: int,
    before: str,
    *,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Labels:
    """Label head `head` of the logits `spec`, starting from `before`, and write `output`.

    The other heads keep the labels that they have in `before`. Raises BadData where the
    two files are not of the same images and heads, UsageError for another method than sela.
    """
    settings.check()
    if settings.method != "sela":
        raise UsageError(
            f"--head labels one head by --method sela, not {settings.method}",
            "leave --head out: it clusters all heads",
        )
    kept = formats.read_labels(before)
    with open_scores(spec) as scores:
        if head >= len(scores.heads):
            raise UsageError(f"--head {head}: {spec} has heads 0 to {len(scores.heads) - 1}")
        if scores.keys != kept.keys or len(scores.heads) != len(kept.heads):
            raise BadData(f"{before} labels other images or heads than {spec} has")
        one = replace(scores, heads=[scores.heads[head]])
        start = replace(kept, heads=[kept.heads[head]])
        solved = label(one, spec, settings, start, progress, device)
        provenance = provenance_of(scores, spec, asdict(settings) | {"head": head}, kept)
    heads = [*kept.heads]
    heads[head] = solved.heads[0]
    labels = Labels(kept.keys, kept.index_N, heads)
    job.once(partial(formats.write_labels, output, labels, provenance, force=True))
    return labels
