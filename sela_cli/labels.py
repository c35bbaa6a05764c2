"""Stage 2: logits -> labels. Reads a score matrix, solves each head, writes a labels file.

N rows (images), K clusters, n rows of one tile, T heads.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sela_cli import (
    assignment,
    formats,
    interrupt,
    job,
    lbfgs,
    metrics,
    newton,
    outputs,
    parallel,
    sinkhorn,
)
from sela_cli.assignment import Bounds
from sela_cli.budget import Budget
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, StoppedEarly, UsageError
from sela_cli.export_tables import write_csv
from sela_cli.formats import HeadLabels, Labels
from sela_cli.marginals import Given, Marginal
from sela_cli.progress import Progress, silent
from sela_cli.score_rows import INPUT_KINDS, ScoreRows
from sela_cli.scores import Matrix, Scores, open_scores
from sela_cli.semidual import Problem, Solution, Step
from sela_cli.shares import marginal, marginal_file
from sela_cli.spread import spread
from sela_cli.tiles import InMemory, Part, Resident, Rows, evenly, tile_rows

ASSIGN_KINDS = ("balanced", "argmax", "random", "fixed")
METHODS = ("sela", "kmeans")
SOLVERS = ("auto", "newton", "lbfgs", "sinkhorn")
# Options of a solve, and those that labels come by otherwise have no use for.
_OF_SOLVES = ("lamb", "tol", "marginal", "min_size", "max_size", "solver")
_NOT_OF = {
    "--method kmeans": (*_OF_SOLVES, "max_memory", "assign", "input_kind"),
    "--assign random": (*_OF_SOLVES, "max_iter", "input_kind", "max_memory"),
    "--fixed": (*_OF_SOLVES, "max_iter"),
}

# Its product with any score is finite (`score_rows`).
_LARGEST_LAMB = 1e8

# A moved row may lose this share of the mean cost more than it must.
_SLACK = 1e-4
# Rows that this mean is taken over.
_SOME = 4096
# Rows that tell probabilities from logits, and how far from 1 the sum of one may be.
_LOOKED_AT, _OFF_ONE = 100, 1e-2
# Reads after which a residual that has not fallen is one that won't.
_IN_VAIN = 10


@dataclass(frozen=True)
class LabelSettings:
    """Options of the label solve; see `sela label --help`.

    `clusters` are those of `kmeans`; default: the columns of each head.
    `max_memory` is in bytes. `min_size` and `max_size` bound the clusters of balanced
    labels in place of the marginal.
    """

    lamb: float = 25.0
    tol: float = 1e-4
    max_iter: int = 2000
    marginal: str = "uniform"
    assign: str = "balanced"
    input_kind: str = "logits"
    seed: int = 0
    method: str = "sela"
    clusters: tuple[int, ...] | None = None
    solver: str = "auto"
    min_size: int | None = None
    max_size: int | None = None
    max_memory: int = 4 << 30

    def check(self) -> None:
        """Raises UsageError where an option has no meaning."""
        for option, value in (("--lamb", self.lamb), ("--tol", self.tol)):
            if not 0 < value < math.inf:
                raise UsageError(f"{option} {value} must be positive and finite")
        if self.lamb > _LARGEST_LAMB:
            raise UsageError(f"--lamb {self.lamb} must be at most {_LARGEST_LAMB:g}")
        if self.max_iter < 1:
            raise UsageError(f"--max-iter {self.max_iter} must be at least 1")
        if self.assign not in ASSIGN_KINDS:
            raise UsageError(f"--assign {self.assign} is none of {', '.join(ASSIGN_KINDS)}")
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method} is none of {', '.join(METHODS)}")
        if self.clusters and self.method != "kmeans":
            raise UsageError("--clusters is for --method kmeans: scores have a column a cluster")
        for name in self._unused:
            if getattr(self, name) != getattr(LabelSettings, name):
                option = f"--{name.replace('_', '-')}"
                if name == "assign" and self.assign == "fixed":
                    option = "--fixed"
                raise UsageError(f"{option} is not for {self._way}", "drop one of them")
        if self.solver not in SOLVERS:
            raise UsageError(f"--solver {self.solver} is none of {', '.join(SOLVERS)}")
        if self.bounded and (self.assign != "balanced" or self.marginal != "uniform"):
            raise UsageError(
                "--min-size and --max-size are for --assign balanced, in place of --marginal"
            )
        if self.input_kind not in INPUT_KINDS:
            raise UsageError(f"--input-kind {self.input_kind} is none of {', '.join(INPUT_KINDS)}")

    def as_used(self) -> LabelSettings:
        """The same, but what such labels have no use for is as by default."""
        return replace(self, **{name: getattr(LabelSettings, name) for name in self._unused})

    @property
    def bounded(self) -> bool:
        """Whether sizes are only to lie between bounds."""
        return (self.min_size, self.max_size) != (None, None)

    @property
    def _way(self) -> str:
        """The option that says how labels are come by."""
        if self.method == "kmeans":
            return "--method kmeans"
        return "--fixed" if self.assign == "fixed" else f"--assign {self.assign}"

    @property
    def _unused(self) -> tuple[str, ...]:
        return _NOT_OF.get(self._way, ())


def label_stage(
    spec: str,
    output: str,
    settings: LabelSettings,
    *,
    init: str | None = None,
    head: int | None = None,
    csv_path: str | None = None,
    force: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> Labels:
    """Label the scores that `spec` names and write `output`; see docs/schema.md.

    `init`: labels file whose potentials the solve starts from. `head`: the one to label, as
    the reference does it for small data; the others keep the labels that they have in `init`.
    Whether all heads reached the tolerance is for the caller to see: `warning`. `say` is
    given a hint where logits look like probabilities. Raises BadData and UsageError.
    """
    settings.check()
    check_outputs(spec, output, settings, init, csv_path, force)
    with open_scores(spec) as scores:
        start = formats.read_labels(init) if init else None
        parameters = asdict(settings) | ({} if head is None else {"head": head})
        provenance = _provenance(scores, spec, parameters, start)
        if head is not None:
            assert start
            one, before = _one_head(scores, spec, settings, head, start)
            heads = [*start.heads]
            heads[head] = label(one, spec, settings, before, progress, device).heads[0]
            labels = Labels(start.keys, start.index_N, heads)
        elif settings.method == "kmeans":
            # scikit-learn takes a quarter of the start of a command that needs none of it.
            from sela_cli.kmeans import kmeans_labels

            labels = kmeans_labels(
                scores,
                spec,
                settings.clusters,
                seed=settings.seed,
                max_iter=settings.max_iter,
                before=start,
                progress=progress,
            )
        else:
            # A logits file of sela's holds what it says.
            unsure = settings.input_kind == "logits" and not scores.header
            if unsure and settings.assign != "random" and _seem_shares(scores.heads[0]):
                say(
                    f"hint: rows of {spec} sum to 1: if they are probabilities, "
                    "use --input-kind probabilities"
                )
            labels = label(scores, spec, settings, start, progress, device)

    def write() -> None:
        formats.write_labels(output, labels, provenance, force)
        if csv_path:
            write_csv(csv_path, labels, force)

    job.once(write)
    return labels


def check_outputs(
    spec: str,
    output: str,
    settings: LabelSettings,
    init: str | None,
    csv_path: str | None,
    force: bool,
) -> None:
    """Refuse, before any row is read, outputs that can't be written or are inputs.

    Labels may take the place of `init`. Raises UsageError and CannotCreate.
    """
    if csv_path and outputs.same_file(csv_path, output):
        raise UsageError(f"--output and --csv are both {output}", "name two files")
    weights = marginal_file(settings.marginal)
    outputs.check_output(output, force, spec, weights)
    if csv_path:
        outputs.check_output(csv_path, force, spec, weights, init)


def _seem_shares(matrix: Matrix) -> bool:
    """Whether some of the rows, evenly spread, are shares of one."""
    some_nK = matrix.read(spread(matrix.shape[0], _LOOKED_AT))
    if not some_nK.size or not (some_nK >= 0).all():
        return False
    return bool((abs(some_nK.sum(1, dtype=np.float64) - 1) < _OFF_ONE).all())


def _provenance(
    scores: Scores, spec: str, parameters: dict[str, Any], init: Labels | None
) -> Provenance:
    """What labels of these scores come from."""
    provenance = Provenance("label", parameters)
    if scores.header:
        provenance = provenance.reading("logits", scores.header)
    else:
        provenance = provenance.reading_foreign("scores", spec)
    if init and init.header:
        provenance = provenance.reading("init", init.header)
    return provenance.of(scores.dataset_id)


def _came_no_nearer(head: HeadLabels) -> bool:
    """Whether a solve ended where it began, which another like it would too."""
    residuals = head.trace.get("residual", np.zeros(0))
    return len(residuals) > _IN_VAIN and residuals[-1] >= residuals[0]


def warning(labels: Labels, output: str, head: int | None = None) -> StoppedEarly | None:
    """What to raise or to say if a head did not converge, or `head` alone."""
    looked_at = labels.heads if head is None else [labels.heads[head]]
    failed = [each.attributes for each in looked_at if not each.attributes["converged"]]
    if not failed:
        return None
    worst = max(attributes["residual"] for attributes in failed)
    how, mend = "", "allow a larger --max-iter"
    # Labels by k-means have no residual, and potentials that say nothing.
    if math.isfinite(worst):
        how = f" (residual {worst:.2g}, asked for {failed[0]['tol']:g})"
        if worst <= failed[0]["tol"]:
            how = " (stopped before the sizes were balanced)"
        mend += " or --tol"
        stuck = all(_came_no_nearer(each) for each in looked_at)
        if output != "-" and not stuck:
            mend = f"go on with --init {shlex.quote(output)} --force, or {mend}"
    return StoppedEarly(
        f"{output}: {len(failed)} of {len(looked_at)} heads did not converge{how}; "
        "labels are written",
        mend,
    )


def plan(
    spec: str, settings: LabelSettings, init: str | None = None, head: int | None = None
) -> dict[str, Any]:
    """What a dry run shows, after the checks of the real one; `head` is the one to label."""
    settings.check()
    with open_scores(spec) as scores:
        before = formats.read_labels(init) if init else None
        chosen, start = scores, before
        if head is not None and before:
            chosen, start = _one_head(scores, spec, settings, head, before)
        check(chosen, spec, settings, start)
        return {
            "rows": len(scores.keys),
            "heads": [matrix.shape[1] for matrix in scores.heads],
            "settings": asdict(settings),
            "tile_rows": [tile_rows(matrix.shape[1]) for matrix in scores.heads],
        }


def _one_head(
    scores: Scores, spec: str, settings: LabelSettings, head: int, before: Labels
) -> tuple[Scores, Labels]:
    """The scores and the earlier labels of one head alone.

    Raises BadData where the two are not of the same images and heads, UsageError where there
    is no such head, or for another method than sela.
    """
    if settings.method != "sela":
        raise UsageError(
            f"--head labels one head by --method sela, not {settings.method}",
            "leave --head out: it clusters all heads",
        )
    if head >= len(scores.heads):
        raise UsageError(f"--head {head}: {spec} has heads 0 to {len(scores.heads) - 1}")
    if scores.keys != before.keys or len(scores.heads) != len(before.heads):
        assert before.header is not None
        raise BadData(f"{before.header.path} labels other images or heads than {spec} has")
    return replace(scores, heads=[scores.heads[head]]), replace(before, heads=[before.heads[head]])


def summary(labels: Labels, output: str) -> tuple[dict[str, Any], str]:
    """The result of `sela label`, as JSON values and as text."""
    heads = [metrics.certificate(head) for head in labels.heads]
    lines = [f"{output}: {len(labels.keys)} rows", *metrics.certificate_lines(heads)]
    return {"output": output, "rows": len(labels.keys), "heads": heads}, "\n".join(lines)


def label(
    scores: Scores,
    path: str,
    settings: LabelSettings,
    init: Labels | None = None,
    progress: Progress = silent,
    device: str = "cpu",
) -> Labels:
    """Solve every head of `scores`; `path` is how errors name it."""
    check(scores, path, settings, init)
    generator = torch.Generator().manual_seed(settings.seed)
    where = torch.device(device)
    taken = 0
    if settings.assign != "random":
        widest = max(scores.heads, key=lambda matrix: matrix.shape[1])
        taken = _budget(widest, settings).keep_features(scores, where)
    heads = []
    for number, matrix in enumerate(scores.heads):
        before = init.heads[number] if init else None
        if settings.assign == "random":
            heads.append(_random_head(*matrix.shape, generator))
            continue
        rows = ScoreRows(matrix, path, settings.input_kind, where)
        if settings.assign == "fixed" and before:
            heads.append(_fixed_head(rows, settings, before, taken))
            continue
        init_K = torch.from_numpy(before.potentials_K) if before else None
        name = f"head {number + 1}/{len(scores.heads)} " if len(scores.heads) > 1 else ""
        heads.append(_solve_head(rows, settings, init_K, taken, name, progress))
    return Labels(scores.keys, scores.index_N, heads)


def check(scores: Scores, path: str, settings: LabelSettings, init: Labels | None) -> None:
    """Refuse, before any row is read, what can't be labelled. Raises BadData and UsageError."""
    if settings.method == "kmeans":
        from sela_cli.kmeans import matched

        matched(scores, path, settings.clusters, init)
        return
    if settings.assign == "fixed" and init is None:
        raise UsageError("--fixed labels by the potentials of --init FILE", "name a labels file")
    if init and len(init.heads) != len(scores.heads):
        raise BadData(
            f"--init has {len(init.heads)} heads, {path} has {len(scores.heads)}", "drop --init"
        )
    for number, matrix in enumerate(scores.heads):
        count, clusters = matrix.shape
        if count == 0 or clusters == 0:
            raise BadData(f"{path}: '{matrix.name}' has shape {matrix.shape}: nothing to label")
        # More often a matrix of clusters x images than what is meant.
        if clusters > count and settings.assign != "fixed" and not settings.bounded:
            mend = "use at most as many clusters as images"
            if settings.assign == "balanced" and settings.marginal == "uniform":
                mend += "; sela label --max-size 1 gives each a cluster of its own"
            raise BadData(
                f"{path}: '{matrix.name}' has {clusters} clusters for {count} images", mend
            )
        before = init.heads[number] if init else None
        if before and len(before.potentials_K) != clusters and settings.assign != "random":
            raise BadData(
                f"--init head {number} has {len(before.potentials_K)} clusters, not {clusters}"
            )
        if settings.assign == "fixed" and before and not math.isfinite(before.attributes["lamb"]):
            raise BadData(
                "--fixed: these labels were not solved for", "solve with sela label first"
            )
        if settings.assign != "random":
            _budget(matrix, settings).check(settings.assign == "balanced")
        if settings.assign in ("balanced", "argmax"):
            _bounds(count, clusters, settings)
            marginal(settings.marginal, clusters)


def _random_head(count: int, clusters: int, generator: torch.Generator) -> HeadLabels:
    return HeadLabels(
        labels_N=assignment.random_balanced(count, clusters, generator).astype(np.int32),
        potentials_K=np.zeros(clusters),
        attributes=formats.unsolved("random"),
    )


def check_memory(rows: int, clusters: int, settings: LabelSettings) -> None:
    """Raises UsageError where --max-memory is too little for labels of so many rows."""
    _budget_of((rows, clusters), settings).check(settings.assign == "balanced")


def _budget(matrix: Matrix, settings: LabelSettings) -> Budget:
    return _budget_of(matrix.shape, settings, matrix.resident)


def _budget_of(shape: tuple[int, int], settings: LabelSettings, resident: int = 0) -> Budget:
    newton = settings.solver in ("auto", "newton")
    return Budget(*shape, settings.max_memory, newton, resident)


class _Sizes(NamedTuple):
    """The marginal to solve for, and the sizes that are allowed."""

    marginal: Marginal
    allowed: Bounds


def _bounds(count: int, clusters: int, settings: LabelSettings) -> Bounds | None:
    """The sizes that are allowed in place of those of the marginal, if any were given."""
    if not settings.bounded:
        return None
    low, high = settings.min_size or 0, min(settings.max_size or count, count)
    if not low <= high or not low * clusters <= count <= high * clusters:
        raise UsageError(
            f"{clusters} clusters of {low} to {high} rows cannot hold {count} rows",
            "mend --min-size and --max-size",
        )
    return Bounds(np.full(clusters, low), np.full(clusters, high))


def _sizes(rows: Rows, settings: LabelSettings) -> _Sizes:
    count, clusters = rows.shape
    allowed = _bounds(count, clusters, settings)
    if allowed is None:
        marginal_K = marginal(settings.marginal, clusters)
        return _Sizes(Given(marginal_K), assignment.size_bounds(count, marginal_K.numpy()))
    return _Sizes(assignment.between(rows, allowed), allowed)


def _solve_head(
    rows: ScoreRows,
    settings: LabelSettings,
    init_K: Tensor | None,
    taken: int,
    name: str,
    progress: Progress,
) -> HeadLabels:
    solve, refine = {
        "auto": (newton.solve, newton.refine),
        "newton": (newton.solve, newton.refine),
        "lbfgs": (lbfgs.solve, lbfgs.solve),
        "sinkhorn": (sinkhorn.solve, sinkhorn.solve),
    }[settings.solver]
    budget, shared = _budget(rows.matrix, settings), parallel.size() > 1
    mine = job.share(rows.shape[0])
    # Every process makes the labels of all rows. On a GPU that, and not solving, takes time.
    whole = rows if shared and rows.device.type == "cpu" else budget.kept(rows, taken)
    part = whole
    if shared and isinstance(whole, Resident):
        part = whole.rows(mine)
    elif shared:
        part = budget.kept(Part(rows, mine.start, mine.stop), taken)
    sizes = _sizes(whole, settings)
    problem = Problem(
        part,
        sizes.marginal,
        settings.lamb,
        settings.tol,
        settings.max_iter,
        progress=lambda step: progress(
            step.iteration, 0, f"{name}residual {step.residual:.1e} (tol {settings.tol:.0e})"
        ),
        stop=interrupt.requested,
        memory=budget.plans,
        square=budget.square,
    )
    solution = solve(problem, init_K)
    # Far from the solution most rows would have to move, and a signal leaves little time.
    stopped = not solution.converged and parallel.any_of(interrupt.requested())
    result = None
    if settings.assign == "balanced" and not stopped:

        def moving(left: int) -> None:
            progress(0, 0, f"{name}{left} rows to move")
            if parallel.any_of(interrupt.requested()):
                raise InterruptedError

        # What plans took is free again, and where rows are not kept so is all that they would.
        # All processes balance in step, whatever the size of their shares.
        unkept = parallel.any_of(not isinstance(part, InMemory))
        free = budget.unused - taken if unkept else budget.plans
        with suppress(InterruptedError):
            result = _balanced(whole, problem, solution, sizes.allowed, refine, moving, free)
    assign = "argmax" if result is None else "balanced"
    if result is None:
        result = assignment.certified(whole, solution.potentials_K / settings.lamb, sizes.allowed)
    done = assign == settings.assign
    return HeadLabels(
        labels_N=result.labels_N.astype(np.int32),
        potentials_K=solution.potentials_K.numpy(),
        attributes={
            "assign": assign,
            "lamb": settings.lamb,
            "tol": settings.tol,
            "residual": solution.residual,
            "n-iters": solution.trace[-1].iteration,
            "converged": solution.converged and done,
            "objective": result.objective,
            "lower-bound": result.lower_bound,
            "status": _status(solution, settings) if done else "stopped",
            "bytes-read": _bytes_read(rows),
        },
        trace=_columns(solution),
    )


def _balanced(
    rows: Rows,
    problem: Problem,
    solution: Solution,
    bounds: Bounds,
    refine: Callable[[Problem, Tensor], Solution],
    progress: Callable[[int], None],
    memory: int,
) -> assignment.Certified:
    """Labels of sizes within bounds, from potentials that are nearly right."""
    sharp_K, preferred = assignment.sharpen(rows, problem, solution.potentials_K, refine, bounds)
    slack = _SLACK * assignment.certified(evenly(rows, _SOME), sharp_K, None).objective
    labels_N, prices_K = assignment.balanced(
        rows,
        sharp_K,
        bounds,
        slack,
        progress=progress,
        memory=memory,
        preferred=preferred,
    )
    return assignment.certified(rows, prices_K, bounds, labels_N)


def _status(solution: Solution, settings: LabelSettings) -> str:
    """Why the solve ended."""
    if solution.converged:
        return "converged"
    return "max-iter" if len(solution.trace) >= settings.max_iter else "stopped"


def _bytes_read(rows: ScoreRows) -> int:
    """Of the head's scores, from where they are stored, by all processes."""
    return int(parallel.sum_of(torch.tensor(rows.matrix.tally.take())))


def _columns(solution: Solution) -> dict[str, np.ndarray]:
    values = zip(*solution.trace, strict=True)
    return {name: np.array(column) for name, column in zip(Step._fields, values, strict=True)}


def _fixed_head(
    rows: ScoreRows, settings: LabelSettings, before: HeadLabels, taken: int
) -> HeadLabels:
    """The labels that saved potentials give to rows that they were not solved for."""
    lamb = before.attributes["lamb"]
    kept = _budget(rows.matrix, settings).kept(rows, taken)
    result = assignment.certified(kept, torch.from_numpy(before.potentials_K) / lamb, None)
    known = {"lamb": lamb, "objective": result.objective, "bytes-read": _bytes_read(rows)}
    return HeadLabels(
        labels_N=result.labels_N.astype(np.int32),
        potentials_K=before.potentials_K,
        attributes=formats.unsolved("fixed") | known,
    )
