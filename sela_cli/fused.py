"""A pass over scores on a GPU as one Triton kernel: every row is read once.

n rows of a tile, K columns (clusters), P programs of a launch.

The row's maximum, the exponentials, their sum and the column sums of the softmax are
worked out where the row has been read, in registers; torch writes and reads the tile
again for each. A program takes one row at a time, in as few threads as hold it: they wait
for each other at every maximum and sum. Every program adds up rows of its own and the
programs' sums are added in order, so that a pass gives the same bits each time. Sources:
Milakov and Gimelshein 2018 (online normaliser for softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sela_cli.devices import sent
from sela_cli.tiles import finite

# Longer rows do not fit into the registers of a program, and are read three times.
_LONGEST = 8192
_BLOCK = 2048
# Bytes of a row that are held by 32 threads, and threads of a program at most, in 32s.
_HELD, _MOST_WARPS = {torch.float32: 4096, torch.float64: 2048}, 16
# Programs for each processor of the GPU, by their threads; and for longer rows.
_PROGRAMS, _PROGRAMS_OF_LONG = {1: 16, 2: 8, 4: 8, 8: 4, 16: 2}, 4
# Rows that are added up in the precision of the softmax before float64 takes over.
_GROUP = tl.constexpr(16)


def column_sums(scores_nK: Tensor, lamb: float, a_K: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_i softmax_k(lambda score_ik + a_k), (K,) float64 on the device of the scores.

    `scores_nK`: half, single or double precision, of any magnitude; `dtype`, float32 or
    float64, is what the softmax is worked out in.
    """
    count, clusters = scores_nK.shape
    scores_nK, device = scores_nK.contiguous(), scores_nK.device
    a_K = sent(finite(a_K, dtype), device)
    # A number among a kernel's arguments would be rounded to single precision.
    lamb_1 = sent(torch.tensor([lamb], dtype=dtype), device)
    block = triton.next_power_of_2(clusters)
    warps, programs = _warps_and_programs(block, dtype)
    if clusters > _LONGEST:
        programs = _PROGRAMS_OF_LONG
    programs = max(1, min(count, programs * _processors(device)))
    each = triton.cdiv(count, programs)
    sums_PK = torch.empty(programs, clusters, dtype=torch.float64, device=device)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    shape = (count, clusters, each)
    # Triton launches on the current device.
    with torch.cuda.device_of(scores_nK):
        if clusters <= _LONGEST:
            _sums_of_rows[(programs,)](
                scores_nK, a_K, lamb_1, sums_PK, *shape, BLOCK=block, WIDE=wide, num_warps=warps
            )
        else:
            best_n = torch.empty(count, dtype=torch.float64, device=device)
            log_n = torch.empty(count, dtype=dtype, device=device)
            _logs_of_long_rows[(count,)](
                scores_nK, a_K, lamb_1, best_n, log_n, clusters, BLOCK=_BLOCK, WIDE=wide
            )
            _sums_of_long_rows[(programs, triton.cdiv(clusters, _BLOCK))](
                scores_nK, a_K, lamb_1, best_n, log_n, sums_PK, *shape, BLOCK=_BLOCK, WIDE=wide
            )
    return sums_PK.sum(0)


def _warps_and_programs(block: int, dtype: torch.dtype) -> tuple[int, int]:
    """The threads of a program, in 32s, and how many programs there are for each processor
    of the GPU; see docs/benchmarks-gpu.md."""
    warps = min(max(1, block * dtype.itemsize // _HELD[dtype]), _MOST_WARPS)
    return warps, _PROGRAMS[warps]


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _read(scores, row, k, clusters: tl.constexpr, there, WIDE: tl.constexpr):
    """Part of a row, in the precision asked for or as it is stored where that is finer."""
    x = tl.load(scores + tl.cast(row, tl.int64) * clusters + k, mask=there, other=-float("inf"))
    return x if x.dtype == tl.float64 else x.to(WIDE)


@triton.jit
def _sums_of_rows(
    scores,
    a,
    lamb,
    sums,
    count,
    clusters: tl.constexpr,
    each,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    there = k < clusters
    a_K = tl.load(a + k, mask=there, other=-float("inf"))
    factor = tl.load(lamb)
    total_K = tl.zeros([BLOCK], tl.float64)
    first = program * each
    last = tl.minimum(first + each, count)
    # One ahead: memory is waited for while the row before is worked on.
    ahead_K = _read(scores, first, k, clusters, there & (first < last), WIDE)
    for start in range(first, last, _GROUP):
        group_K = tl.zeros([BLOCK], WIDE)
        for row in range(start, tl.minimum(start + _GROUP, last)):
            x_K = ahead_K
            ahead_K = _read(scores, row + 1, k, clusters, there & (row + 1 < last), WIDE)
            z_K = factor * (x_K - tl.max(x_K, 0)).to(WIDE) + a_K
            e_K = tl.exp(z_K - tl.max(z_K, 0))
            group_K += e_K / tl.sum(e_K, 0)
        total_K += group_K.to(tl.float64)
    tl.store(sums + program.to(tl.int64) * clusters + k, total_K, mask=k < clusters)


@triton.jit
def _logs_of_long_rows(
    scores,
    a,
    lamb,
    best,
    logs,
    clusters: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A row's largest score, and the logarithm of its sum of exponentials."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    factor = tl.load(lamb)
    best_k = _read(scores, row, k, clusters, k < clusters, WIDE)
    for start in range(BLOCK, clusters, BLOCK):
        there = start + k < clusters
        best_k = tl.maximum(best_k, _read(scores, row, start + k, clusters, there, WIDE))
    top = tl.max(best_k, 0)
    # Each lane keeps a maximum and a sum of its own; -inf less -inf would be no number.
    z_k = tl.full([BLOCK], -1e30, WIDE)
    sum_k = tl.zeros([BLOCK], WIDE)
    for start in range(0, clusters, BLOCK):
        there = start + k < clusters
        a_k = tl.load(a + start + k, mask=there, other=-float("inf"))
        x_k = _read(scores, row, start + k, clusters, there, WIDE)
        new_k = factor * (x_k - top).to(WIDE) + a_k
        larger_k = tl.maximum(z_k, new_k)
        sum_k = sum_k * tl.exp(z_k - larger_k) + tl.exp(new_k - larger_k)
        z_k = larger_k
    largest = tl.max(z_k, 0)
    total = tl.sum(sum_k * tl.exp(z_k - largest), 0)
    tl.store(best + row, top.to(tl.float64))
    tl.store(logs + row, largest + tl.log(total))


@triton.jit
def _sums_of_long_rows(
    scores,
    a,
    lamb,
    best,
    logs,
    sums,
    count,
    clusters: tl.constexpr,
    each,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = k < clusters
    a_k = tl.load(a + k, mask=there, other=-float("inf"))
    factor = tl.load(lamb)
    total_k = tl.zeros([BLOCK], tl.float64)
    first = program * each
    last = tl.minimum(first + each, count)
    for start in range(first, last, _GROUP):
        group_k = tl.zeros([BLOCK], WIDE)
        for row in range(start, tl.minimum(start + _GROUP, last)):
            x_k = _read(scores, row, k, clusters, there, WIDE)
            top = tl.load(best + row).to(x_k.dtype)
            z_k = factor * (x_k - top).to(WIDE) + a_k
            group_k += tl.exp(z_k - tl.load(logs + row))
        total_k += group_k.to(tl.float64)
    tl.store(sums + program.to(tl.int64) * clusters + k, total_k, mask=there)
