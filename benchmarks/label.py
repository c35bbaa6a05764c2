"""`make bench-label`: the label solve beside its peers, to docs/benchmarks.md.

    python benchmarks/label.py --inputs benchmarks/inputs --output docs/benchmarks.md

Every solve runs in a process of its own, which measures its seconds (without imports,
compilation and reading the input) and its peak memory; one after another, so that all
have the whole machine. Residuals and objectives are computed afterwards, by one function
in float64, from the potentials that each solver found.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gpu
import h5py
import numpy as np
import torch

from sela_cli import lbfgs, newton, sinkhorn
from sela_cli.machine import processor
from sela_cli.score_rows import ScoreRows
from sela_cli.scores import Matrix
from sela_cli.semidual import Problem
from sela_cli.shares import marginal
from sela_cli.tiles import InMemory, map_spans, tile_rows

LAMB = 25.0
OURS = {"newton": newton.solve, "lbfgs": lbfgs.solve, "sinkhorn": sinkhorn.solve}
# Iterations at most: a peer that needs more than these would take minutes an input.
CAPS = {"reference": 2000, "reference float32": 2000, "POT": 40, "OTT-JAX": 40, "sinkhorn": 200}
NAMES = ["reference", "reference float32", "POT", "OTT-JAX", "sinkhorn", "lbfgs", "newton"]


def peaked(count: int, clusters: int, seed: int = 0, width: int = 64) -> torch.Tensor:
    """Log-probabilities of noisy features near one of K prototypes, of uneven popularity."""
    generator = torch.Generator().manual_seed(seed)
    centres_KD = torch.randn(clusters, width, generator=generator)
    features_ND = centres_KD[torch.randint(0, clusters, (count,), generator=generator)]
    features_ND = features_ND + 1.5 * torch.randn(count, width, generator=generator)
    heads_KD = centres_KD + 0.3 * torch.randn(clusters, width, generator=generator)
    bias_K = torch.randn(clusters, generator=generator)
    return torch.log_softmax(features_ND @ heads_KD.T / 8 + bias_K, 1)


def scores_of(name: str, inputs: Path) -> torch.Tensor:
    """Log-probabilities, float32: `peaked:N:K`, or `fresh/0` of the inputs' files."""
    kind, _, rest = name.partition(":")
    if kind == "peaked":
        count, clusters = map(int, rest.split(":"))
        return peaked(count, clusters)
    stage, head = name.split("/")
    with h5py.File(inputs / f"{stage}.h5") as file:
        logits_NK = torch.from_numpy(file[f"logits/{head}"][()].astype(np.float32))
    return torch.log_softmax(logits_NK, 1)


def rows_of(scores_NK: torch.Tensor) -> ScoreRows:
    """As `sela label` sees them."""
    array = scores_NK.numpy()
    return ScoreRows(Matrix(array.shape, lambda rows: array[rows], "scores"), "memory")


def judge(rows: ScoreRows, potentials_K: torch.Tensor) -> tuple[float, float]:
    """Residual and semi-dual F at potentials, in float64."""
    count, clusters = rows.shape
    potentials_K = potentials_K - potentials_K.mean()

    def work(tiles):  # type: ignore[no-untyped-def]
        s_K, total = torch.zeros(clusters, dtype=torch.float64), 0.0
        for _, tile_nK in tiles:
            z_nK = LAMB * tile_nK + potentials_K
            s_K += torch.softmax(z_nK, 1).sum(0)
            total += float(torch.logsumexp(z_nK, 1).sum())
        return s_K, total

    parts = list(map_spans(rows, work))
    s_K = sum(part[0] for part in parts) / count
    return 0.5 * float((s_K - 1 / clusters).abs().sum()), sum(part[1] for part in parts) / count


def child(name: str, solver: str, tol: float, repeats: int, inputs: Path) -> None:
    """Solve once or several times; print what came of it as JSON."""
    scores_NK = scores_of(name, inputs)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        if solver in OURS:
            start = time.perf_counter()
            rows = InMemory.of(rows_of(scores_NK))
            problem = Problem(
                rows, marginal("uniform", rows.shape[1]), LAMB, tol, CAPS.get(solver, 2000)
            )
            solution = OURS[solver](problem)
            seconds.append(time.perf_counter() - start)
            potentials_K, reads = solution.potentials_K, len(solution.trace)
            done = solution.converged
        else:
            import peers

            if solver.startswith("reference"):
                dtype = torch.float32 if "32" in solver else torch.float64
                found = peers.reference(scores_NK, LAMB, CAPS[solver], dtype)
            else:
                peer = peers.pot if solver == "POT" else peers.ott
                found = peer(scores_NK, LAMB, tol, CAPS[solver])
            seconds.append(found.seconds)
            potentials_K, reads, done = found.potentials_K, found.reads, found.converged
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    residual, objective = judge(rows_of(scores_NK), potentials_K)
    print(
        json.dumps(
            {
                "seconds": statistics.median(seconds),
                "reads": reads,
                "peak": (peak - base) / 2**20,
                "residual": residual,
                "objective": objective,
                "done": done,
            }
        )
    )


def measure(name: str, solver: str, tol: float, repeats: int, inputs: Path) -> dict | None:
    """`child` in a process of its own; None where it failed."""
    command = [sys.executable, __file__, "--inputs", str(inputs), "--child", name, solver]
    command += [str(tol), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def small(names: list[str], inputs: Path, log: Path) -> list[str]:
    """The table of the inputs that fit in memory; rows that are in the log are taken from it."""
    lines = [
        "| input | N x K | solver | seconds | reads | memory GiB | residual | objective F "
        "| reference / this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    logged = log.read_text().splitlines() if log.exists() else []
    rows = {tuple(line.split(" | ")[:3]): line for line in logged}
    for name in names:
        shape = " x ".join(f"{side:,}" for side in scores_of(name, inputs).shape)
        if all((f"| {name}", shape, solver) in rows for solver in NAMES):
            lines += [rows[f"| {name}", shape, solver] for solver in NAMES]
            continue
        first = measure(name, "reference", 0, 1, inputs)
        assert first is not None
        tol = max(first["residual"], 1e-9) if first["done"] else 1e-6
        for solver in NAMES:
            repeats = 3 if solver == "newton" else 1
            again = solver == "reference"
            found = first if again else measure(name, solver, tol, repeats, inputs)
            if found is None:
                lines.append(f"| {name} | {shape} | {solver} | failed | | | | | |")
                continue
            mark = "" if found["done"] else " (cap)"
            lines.append(
                f"| {name} | {shape} | {solver} | {found['seconds']:.2f}{mark} "
                f"| {found['reads']} | {found['peak']:.2f} | {found['residual']:.1e} "
                f"| {found['objective']:.6f} | {first['seconds'] / found['seconds']:.1f} |"
            )
            print(lines[-1], flush=True)
            with log.open("a") as stream:
                stream.write(lines[-1] + "\n")
    return lines


def write_large(path: Path, count: int, clusters: int, dtype: str) -> None:
    """Logits as `peaked:N:K` has them, in pieces; those are drawn in one."""
    array = np.lib.format.open_memmap(path, "w+", dtype, (count, clusters))
    for start, piece_nK in gpu.peaked(count, clusters, torch.device("cpu")):
        array[start : start + len(piece_nK)] = piece_nK.numpy()
    array.flush()


# Not ru_maxrss: that of a child counts what its parent was before exec.
PEAK = """
import sys
from sela_cli.cli import main
try:
    main()
finally:
    lines = open("/proc/self/status").read().splitlines()
    print(*(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""


def command_run(path: Path, assign: str, memory: str) -> tuple[float, float, dict]:
    """Seconds, peak GiB and result of a whole `sela label`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PEAK, "label", str(path), "-o", f"{folder}/labels.h5"]
        command += ["--assign", assign, "--max-memory", memory, "--json", "--quiet"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
        return seconds, int(done.stderr.split()[-1]) / 2**20, json.loads(done.stdout)["heads"][0]


def large(sizes: list[str], folder: Path) -> list[str]:
    """The table of whole commands on files: `NxK[:ASSIGN[:DTYPE]]`."""
    lines = [
        "| N x K | file | assign | seconds | peak GiB | reads | residual | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        shape, only, dtype, *_ = [*size.split(":"), "", ""]
        dtype = dtype or "float16"
        count, clusters = map(int, shape.split("x"))
        path = folder / f"large-{count}-{clusters}.npy"
        if not path.exists():
            write_large(path, count, clusters, dtype)
        for assign in [only] if only else ["argmax", "balanced"]:
            seconds, peak, head = command_run(path, assign, "4G")
            gap = head["objective"] - head["lower-bound"] if assign == "balanced" else float("nan")
            lines.append(
                f"| {count:,} x {clusters:,} | {path.stat().st_size / 2**30:.2f} GiB {dtype} "
                f"| {assign} "
                f"| {seconds:.1f} | {peak:.2f} | {head['n-iters']} | {head['residual']:.1e} "
                f"| {gap / head['objective']:.1e} |"
            )
            print(lines[-1], flush=True)
        path.unlink()
    return lines


def floors() -> list[str]:
    """How far a pass is from what the machine can do."""
    scores_NK = torch.rand(20_000, 1000) - 1
    rows = InMemory(rows_of(scores_NK), scores_NK)
    problem = Problem(rows, marginal("uniform", 1000), LAMB, 1e-4, 100)

    def exponentials(tiles: Iterator[tuple[int, torch.Tensor]]) -> None:
        room_nK = torch.empty(tile_rows(1000), 1000)
        for _, tile_nK in tiles:
            torch.exp(tile_nK, out=room_nK[: len(tile_nK)])

    alone, whole = [], []
    for _ in range(101):
        start = time.perf_counter()
        list(map_spans(rows, exponentials, torch.float32))
        middle = time.perf_counter()
        problem.read(torch.zeros(1000, dtype=torch.float64))
        alone.append(middle - start)
        whole.append(time.perf_counter() - middle)
    # Not the medians: in a second's worth of work other tenants count for more than the floor.
    one, exponential = min(whole), min(alone)
    return [
        f"A pass over 20,000 x 1,000 float32 in memory takes {one * 1e3:.1f} ms; the exponentials "
        f"alone, of the same tiles and left in the cache, {exponential * 1e3:.1f} ms, both on "
        f"{torch.get_num_threads()} threads, the fastest of 101 turns: a pass is "
        f"{one / exponential:.1f} times that floor.",
    ]


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=Path, default=Path("benchmarks/inputs"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--parts", default="small,large", help="small, large, or both")
    parser.add_argument(
        "--sizes",
        default="10000x1000,100000x1000,1000000x1000,100000x100,100000x300,100000x3000,"
        "100000x10000,20000000x10,1281167x3000,3300000x1000:balanced:float64",
        help="NxK, NxK:ASSIGN or NxK:ASSIGN:DTYPE",
    )
    parser.add_argument("--log", type=Path, default=Path("benchmarks/inputs/rows.md"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs=4)
    options = parser.parse_args()
    if options.child:
        name, solver, tol, repeats = options.child
        child(name, solver, float(tol), int(repeats), options.inputs)
        return
    stages = [
        stage for stage in ("fresh", "half", "trained") if (options.inputs / f"{stage}.h5").exists()
    ]
    names = [f"{stage}/{head}" for head in (0, 1) for stage in stages]
    names += ["peaked:100000:1000", "peaked:30000:3000"]
    import importlib.metadata as metadata

    versions = ", ".join(
        f"{package} {metadata.version(package)}" for package in ("torch", "numpy", "pot", "ott-jax")
    )
    lines = [
        "# Benchmarks of the label solve",
        "",
        "Written by `python benchmarks/label.py` (`make bench-label`).",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {processor()}, {torch.get_num_threads()} "
        f"threads, Python {platform.python_version()}, {versions}. Lambda {LAMB:g}, seed 0. The "
        "machine is shared: compare within a run.",
        "",
    ]
    if "small" in options.parts:
        lines += [
            "## In memory",
            "",
            "`fresh`, `half`, `trained`: logits of CIFAR-10's 50,000 training images by the "
            "networks of `benchmarks/label_inputs.sh` (head 0: K = 128, head 1: K = 1,000). "
            "`peaked`: synthetic. *reference*: the paper's algorithm in float64, to its own stop "
            "test; the others are to reach the residual it has there (1e-9 at least), or 1e-6 "
            "where it never stops. POT stops by the L2 norm of the marginal's error, taken as "
            "2 tol / sqrt(K). "
            "*(cap)*: not there after the iterations allowed "
            f"({', '.join(f'{k} {v}' for k, v in CAPS.items())}). Seconds: one run, newton "
            "the median of three. Reads: passes over the matrix, or over a plan that is kept "
            "whole; two an iteration where there are two products. Memory: peak beyond the "
            "input. *objective F*: the semi-dual, lower is better.",
            "",
            *small(names, options.inputs, options.log),
            "",
            "## Floor",
            "",
            *floors(),
            "",
        ]
    if "large" in options.parts:
        lines += [
            "## Whole commands on files",
            "",
            "`sela label FILE --max-memory 4G`, start to end, logits in a .npy that was written "
            "just before (so in the page cache as far as that holds it, on a machine of "
            f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB), tol "
            "1e-4, one run each. Peak: resident memory of the process. Gap: how far the objective "
            "can be from that of the best labelling of these sizes, by the certificate.",
            "",
            *large(options.sizes.split(","), options.folder),
            "",
        ]
    options.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
