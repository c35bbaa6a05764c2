"""The label solve on a GPU: a pass beside its floor, and a whole solve at ImageNet's size.

    python benchmarks/gpu.py > docs/benchmarks-gpu.md

Needs one GPU with room for the scores (7.7 GB of float16), and a C compiler for Triton.
Everything is printed, as markdown. Small sizes try the script out without a GPU:

    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --rows 40 --clusters 8
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from sela_cli import assignment, newton, semidual
from sela_cli.budget import Budget
from sela_cli.labels import LabelSettings
from sela_cli.semidual import Problem, soft_sizes
from sela_cli.shares import marginal
from sela_cli.tiles import Resident

HEADING = """# The label solve on a GPU

Written by `python benchmarks/gpu.py`: float16 scores of features near prototypes, of uneven
popularity, in the memory of the GPU. *pass*: one read of all scores, by torch's operations and
by the fused kernel, median of 5; the floor is the time to read them at the rate of a copy. The
second table is the kernel with other numbers of threads, called once for all rows.
"""

LAMB = 25.0
# Rows made at a time.
PIECE = 20_000


def peaked(count: int, clusters: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits of noisy features near one of K prototypes, of uneven popularity.

    In pieces, each with the number of its first row.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    centres_KD = normal(clusters, 64)
    heads_KD = centres_KD + 0.3 * normal(clusters, 64)
    bias_K = normal(clusters)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        chosen_n = torch.randint(0, clusters, (size,), generator=generator, device=device)
        features_nD = centres_KD[chosen_n] + 1.5 * normal(size, 64)
        yield start, features_nD @ heads_KD.T / 8 + bias_K


def resident(count: int, clusters: int, device: torch.device) -> Resident:
    """`peaked` as float16 on the device."""
    scores_NK = torch.empty(count, clusters, dtype=torch.float16, device=device)
    for start, piece_nK in peaked(count, clusters, device):
        scores_NK[start : start + len(piece_nK)] = piece_nK
    return Resident(scores_NK)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, after a first time that does not count."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def passes(rows: Resident, kernel: bool, repeats: int) -> tuple[str, float]:
    """The table of passes, and the bytes a second of a copy."""
    stored_NK, device = rows.stored_NK, rows.device
    a_K = torch.linspace(-1, 1, rows.shape[1], dtype=torch.float64)
    # A tenth of the rows: the copy has to fit beside them. It reads and writes every byte.
    some_nK = stored_NK[: max(1, len(stored_NK) // 10)]
    target_nK = torch.empty_like(some_nK)
    copy = seconds(lambda: target_nK.copy_(some_nK), device, repeats)
    bandwidth = 2 * some_nK.nbytes / copy
    floor = stored_NK.nbytes / bandwidth
    lines = [
        f"Copying {some_nK.nbytes / 1e9:.2f} GB: {bandwidth / 1e9:.0f} GB/s read and written; so "
        f"reading the {stored_NK.nbytes / 1e9:.2f} GB of scores once takes {floor * 1e3:.2f} ms.",
        "",
        "| a pass | precision | ms | times the floor | largest difference of a share, times K |",
        "|---|---|---|---|---|",
    ]
    wanted_K = torch.zeros(0)
    for dtype in (torch.float64, torch.float32):
        for name in ("torch", "kernel") if kernel else ("torch",):
            if name == "kernel":
                from sela_cli.fused import column_sums

                semidual._kernel = lambda device: column_sums
            else:
                semidual._kernel = lambda device: None
            found_K = soft_sizes(rows, LAMB, a_K, dtype).s_K
            wanted_K = wanted_K if len(wanted_K) else found_K
            off = float((found_K - wanted_K).abs().max()) * len(a_K)
            took = seconds(lambda dtype=dtype: soft_sizes(rows, LAMB, a_K, dtype), device, repeats)
            lines.append(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {took * 1e3:.2f} "
                f"| {took / floor:.1f} | {off:.1e} |"
            )
    return "\n".join(lines), bandwidth


# Threads in 32s, and programs for each processor; those of the kernel's own choice first.
SHAPES = ((1, 16), (2, 8), (4, 8), (8, 4), (16, 2))
# Numbers of a row that a thread may hold.
MOST_OF_A_THREAD = 32


def shapes(count: int, clusters: int, bandwidth: float, device: torch.device, repeats: int) -> str:
    """The table of the kernel's shapes, for rows of several lengths: a third of the scores."""
    from sela_cli import fused

    lines = [
        "| N x K | precision | threads / 32, programs | ms | times the floor | |",
        "|---|---|---|---|---|---|",
    ]
    chosen = fused._warps_and_programs
    for columns in (128, 1000, clusters):
        rows = max(1, count * clusters // 3 // columns)
        scores_NK = torch.randn(rows, columns, dtype=torch.float16, device=device)
        a_K = torch.linspace(-1, 1, columns, dtype=torch.float64)
        for dtype in (torch.float32, torch.float64):
            block = 1 << (columns - 1).bit_length()
            usual = chosen(block, dtype)
            work = partial(fused.column_sums, scores_NK, LAMB, a_K, dtype)
            for shape in dict.fromkeys([usual, *SHAPES]):
                # A thread has 255 registers.
                if shape != usual and block > MOST_OF_A_THREAD * 32 * shape[0]:
                    continue
                fused._warps_and_programs = lambda block, dtype, shape=shape: shape
                took = seconds(work, device, repeats)
                lines.append(
                    f"| {rows:,} x {columns:,} | {str(dtype).removeprefix('torch.')} "
                    f"| {shape[0]}, {shape[1]} | {took * 1e3:.2f} "
                    f"| {took * bandwidth / scores_NK.nbytes:.1f} "
                    f"| {'usual' if shape == usual else ''} |"
                )
    fused._warps_and_programs = chosen
    return "\n".join(lines)


def solve(rows: Resident, tol: float) -> list[str]:
    """The table of a solve from nothing, and of its labels."""
    count, clusters = rows.shape
    start = time.perf_counter()
    marginal_K = marginal("uniform", clusters)
    problem = Problem(rows, marginal_K, LAMB, tol, 2000)
    solution = newton.solve(problem)
    solved = time.perf_counter()
    bounds = assignment.size_bounds(count, marginal_K.numpy())
    potentials_K = solution.potentials_K
    sharp_K, preferred = assignment.sharpen(rows, problem, potentials_K, newton.refine, bounds)
    slack = 1e-4 * assignment.certified(rows, sharp_K, None).objective
    # As `sela label` has by itself.
    memory = Budget(count, clusters, LabelSettings().max_memory, newton=True).unused
    labels_N, prices_K = assignment.balanced(
        rows, sharp_K, bounds, slack, memory=memory, preferred=preferred
    )
    balanced = time.perf_counter()
    _, objective, bound = assignment.certified(rows, prices_K, bounds, labels_N)
    gap = objective - bound
    return [
        "| N x K | solve s | passes | residual | balance s | gap |",
        "|---|---|---|---|---|---|",
        f"| {count:,} x {clusters:,} | {solved - start:.2f} | {len(solution.trace)} "
        f"| {solution.residual:.1e} | {balanced - solved:.2f} | {gap / objective:.1e} |",
        "",
        "Seconds at the end of each pass: "
        + ", ".join(f"{step.seconds:.2f}" for step in solution.trace),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--clusters", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tol", type=float, default=1e-4)
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = resident(options.rows, options.clusters, device)
    on_gpu = device.type == "cuda"
    chosen = semidual._kernel
    kernel = chosen(device) is not None or "TRITON_INTERPRET" in os.environ
    where = torch.cuda.get_device_name(device) if on_gpu else "no GPU"
    print(HEADING)
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {where}, torch {torch.__version__}, "
        f"kernel {'there' if kernel else 'missing'}, N x K = {rows.shape}.\n"
    )
    table, bandwidth = passes(rows, kernel, options.repeats)
    print(table, end="\n\n", flush=True)
    if kernel:
        size = options.rows, options.clusters
        print(shapes(*size, bandwidth, device, options.repeats), end="\n\n", flush=True)
    semidual._kernel = chosen
    print("\n".join(solve(rows, options.tol)))


if __name__ == "__main__":
    main()
