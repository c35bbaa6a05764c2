"""One head labelled anew, the others kept: the reference's relabelling for small data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from sela_cli import formats, job
from sela_cli.formats import Labels
from sela_cli.labels import LabelSettings, label, one_head, provenance_of
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

    The other heads keep the labels that they have in `before`. For errors see `one_head`.
    """
    settings.check()
    kept = formats.read_labels(before)
    with open_scores(spec) as scores:
        one, start = one_head(scores, spec, settings, head, kept)
        solved = label(one, spec, settings, start, progress, device)
        provenance = provenance_of(scores, spec, asdict(settings) | {"head": head}, kept)
    heads = [*kept.heads]
    heads[head] = solved.heads[0]
    labels = Labels(kept.keys, kept.index_N, heads)
    job.once(partial(formats.write_labels, output, labels, provenance, force=True))
    return labels
