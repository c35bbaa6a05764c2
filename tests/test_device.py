"""The label solve on a GPU, as far as it can be tested without one.

Triton's interpreter runs the kernels; a tensor class that claims to be on a GPU, and refuses
what a GPU's tensors would refuse, runs all the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sela_cli import assignment, newton, semidual, tiles
from sela_cli.devices import Graphed
from sela_cli.formats import HeadLabels
from sela_cli.labels import LabelSettings, label, label_stage
from sela_cli.score_rows import ScoreRows
from sela_cli.scores import Features, Matrix, Product, Scores
from sela_cli.semidual import Problem, laplacian
from sela_cli.shares import marginal
from sela_cli.tiles import CPU, InMemory, Resident

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda", 0)


def scores(count: int, clusters: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 2 * rng.standard_normal((count, 6)) @ rng.standard_normal((6, clusters))


def rows_of(array: np.ndarray, kind: str = "logits", device: torch.device = CPU) -> ScoreRows:
    return ScoreRows(Matrix(array.shape, lambda rows: array[rows], "scores"), "here", kind, device)


# ---- the kernels --------------------------------------------------------------


def check_sums(shapes: list[tuple[int, int]], device: str) -> None:
    """The kernel against a softmax in double precision, for (clusters, rows)."""
    from sela_cli.fused import column_sums

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    for clusters, count in shapes:
        for stored in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for lamb in (0.1, 25.3, 1000.0):
                x_nK = (1e3 + 2 * normal(count, clusters)).to(stored)
                a_K = 3 * normal(clusters, dtype=torch.float64)
                # Clusters that no row wants: their sums underflow to zero, and to nothing else.
                a_K[1::5] -= 1e4
                lesser_nK = x_nK.double() - x_nK.double().amax(1, keepdim=True)
                wanted_K = torch.softmax(lamb * lesser_nK + a_K, 1).sum(0)
                for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
                    found_K = column_sums(x_nK, lamb, a_K, dtype)
                    again_K = column_sums(x_nK, lamb, a_K, dtype)
                    assert found_K.dtype == torch.float64 and torch.equal(found_K, again_K)
                    # Rounding of z = lambda x + a, relative to each row's own sum of one.
                    allowed = tolerance * count * (1 + lamb / 25)
                    off = float((found_K - wanted_K).abs().sum())
                    assert off <= allowed, (clusters, count, stored, lamb, dtype, off)


def in_interpreter(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    # Of Triton 3.6: it makes numbers of arrays with one entry.
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("Triton's interpreter is older than NumPy")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "shapes",
    [
        "[(3, 5)]",
        pytest.param(
            "[(1, 70), (3, 67), (128, 35), (1000, 5), (3000, 3), (8193, 2)]",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_kernels_give_the_sums_of_the_softmax(shapes: str) -> None:
    pytest.importorskip("triton")
    in_interpreter(f"from test_device import check_sums; check_sums({shapes}, 'cpu')")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_give_those_sums_on_a_gpu() -> None:
    check_sums([(1, 70), (3, 67), (128, 5000), (1000, 700), (3000, 3000), (9000, 500)], "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["fp32", "fp64"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: str
) -> None:
    """To machine code of compute capability 9.0: the interpreter takes more than the compiler."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from sela_cli import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"scores": "*fp16", "best": "*fp64", "sums": "*fp64", "count": "i32", "each": "i32"}
    types |= {"a": f"*{wide}", "lamb": f"*{wide}", "logs": f"*{wide}"}
    fixed = {"BLOCK": 4096, "WIDE": triton.language.dtype(wide)}
    for kernel, more in (
        (fused._sums_of_rows, {"clusters": 3000}),
        (fused._logs_of_long_rows, {"clusters": 9001}),
        (fused._sums_of_long_rows, {"clusters": 9001}),
    ):
        known = fixed | more
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=known)
        target = GPUTarget("cuda", 90, 32)
        assert triton.compile(source, target=target, options={"num_warps": 8}).asm["cubin"]


@pytest.mark.slow
def test_a_pass_by_the_kernel_is_a_pass() -> None:
    """Of rows as they are stored, through `soft_sizes`; a dead cluster has a finite share."""
    pytest.importorskip("triton")
    in_interpreter(
        """
import numpy as np, torch
from sela_cli import fused, semidual
from sela_cli.score_rows import ScoreRows
from sela_cli.scores import Matrix
from sela_cli.tiles import Resident

array = (3 * np.random.default_rng(0).standard_normal((50, 20))).astype(np.float16)
array[:, 4] -= 200
rows = ScoreRows(Matrix(array.shape, lambda rows: array[rows], "scores"), "here")
a_K = torch.linspace(-2, 2, 20, dtype=torch.float64)
for dtype in (torch.float32, torch.float64):
    plain = semidual.soft_sizes(rows, 25.0, a_K, dtype)
    kernel, semidual._kernel = semidual._kernel, lambda device: fused.column_sums
    for kept in (rows, Resident.of(rows)):
        found = semidual.soft_sizes(kept, 25.0, a_K, dtype)
        assert found.log_s_K.isfinite().all() and found.log_s_K[4] < -4000
        torch.testing.assert_close(found.log_s_K, plain.log_s_K, rtol=1e-4, atol=1e-5)
    semidual._kernel = kernel
"""
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("clusters", [1, 3, 128, 1000, 3000, 9000])
def test_a_gpu_finds_what_the_processor_finds(tmp_path: Path, clusters: int) -> None:
    """The kernel is there, a pass has the same sums, and a labelling is as good."""
    assert semidual._kernel(GPU) is not None
    array = scores(20_000, clusters).astype(np.float16)
    a_K = torch.linspace(-2, 2, clusters, dtype=torch.float64)
    plain = semidual.soft_sizes(rows_of(array), 5.0, a_K)
    for kept in (rows_of(array, device=GPU), Resident.of(rows_of(array, device=GPU))):
        found = semidual.soft_sizes(kept, 5.0, a_K)
        torch.testing.assert_close(found.s_K, plain.s_K, rtol=1e-9, atol=1e-15)
    np.save(tmp_path / "scores.npy", array)
    heads = [
        label_stage(
            str(tmp_path / "scores.npy"), str(tmp_path / f"{device}.h5"), LabelSettings(lamb=5.0),
            device=device,
        ).heads[0]
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    objectives = [head.attributes["objective"] for head in heads]
    assert objectives[1] == pytest.approx(objectives[0], rel=1e-3)
    assert all(head.attributes["converged"] for head in heads)


# ---- rows that are kept as they are stored --------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16])
def test_stored_rows_are_solved_and_balanced_to_the_same_bits(dtype: type) -> None:
    """Also where the rows that are looked at are kept apart."""
    rows = rows_of((3 * scores(6000, 20)).astype(dtype))
    found = []
    ways = [(rows, 0), (rows, 1 << 28), (InMemory.of(rows), 1 << 28), (Resident.of(rows), 0)]
    for kept, memory in ways:
        marginal_K = marginal("uniform", 20)
        potentials_K = newton.solve(Problem(kept, marginal_K, 5.0, 1e-6, 200)).potentials_K
        bounds = assignment.size_bounds(6000, marginal_K.numpy())
        labels_N, prices_K = assignment.balanced(kept, potentials_K / 5, bounds, memory=memory)
        found.append((potentials_K, prices_K, torch.from_numpy(labels_N)))
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_stored_probabilities_keep_their_zeros() -> None:
    array = np.eye(4)[np.arange(40) % 4]
    rows = rows_of(array, "probabilities")
    assert torch.equal(Resident.of(rows).tile(0, 40), rows.tile(0, 40))


# ---- one graph of many operations ------------------------------------------------


class Replayed:
    """A CUDA graph that only counts."""

    replays = 0

    def replay(self) -> None:
        Replayed.replays += 1


def test_a_graph_is_made_of_the_first_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short batch may come when the graph is due, and cuDNN has never seen it."""
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    done: list[int] = []

    def step(tensor: Tensor) -> Tensor:
        done.append(len(tensor))
        return 2 * tensor

    graphed = Graphed(step)
    sizes = [5, 5, 5, 3, 5, 3, 5]
    assert [len(graphed(torch.ones(size))) for size in sizes] == sizes
    # Three plain calls, the short ones and the capture.
    assert done == [5, 5, 5, 3, 5, 3] and Replayed.replays == 2


# ---- a GPU that is none ---------------------------------------------------------


class Elsewhere(Tensor):
    """On a GPU, by its own account."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class ClaimedGpu(TorchFunctionMode):
    """What is made on a GPU is made here, and marked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call on the tensors as they are; the result is on the GPU if they were."""
    name = getattr(func, "__name__", "")
    tensors = [value for value in flat((args, kwargs)) if isinstance(value, Tensor)]
    there = any(isinstance(value, Elsewhere) for value in tensors)
    if func == Tensor.device.__get__:  # type: ignore[attr-defined]
        return GPU if there else CPU
    devices = [value for value in flat((args, kwargs)) if isinstance(value, torch.device)]
    if name == "numpy" and there:
        raise TypeError("can't convert a tensor on a GPU to numpy")
    if name in ("to", "cpu", "new_tensor"):
        if devices or name == "cpu":
            there = bool(devices) and devices[0].type == "cuda"
        elif len(args) > 1 and isinstance(args[1], Tensor):
            there = isinstance(args[1], Elsewhere)
    elif devices:
        there = devices[0].type == "cuda"
    elif there and name not in ("__getitem__", "__setitem__", "copy_"):
        mixed = [value for value in tensors if not isinstance(value, Elsewhere) and value.ndim]
        if mixed:
            raise RuntimeError(f"{name}: tensors on two devices")
    if name == "pin_memory":
        return args[0]
    result = func(*plain(args), **plain(kwargs))
    return marked(result) if there else result


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    elif isinstance(value, dict):
        yield from flat(tuple(value.values()))
    else:
        yield value


def plain(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if isinstance(value, torch.device):
        return CPU
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return type(value)(items) if type(value) in (list, tuple) else value
    return value


def marked(value: Any) -> Any:
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Elsewhere)
    if isinstance(value, tuple):
        return tuple(marked(item) for item in value)
    return value


@pytest.fixture
def claimed_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The mode is the calling thread's.
    monkeypatch.setattr(tiles, "map_in_pool", lambda work, items, *_: map(work, items))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(semidual, "_kernel", lambda device: None)
    with ClaimedGpu():
        yield


def test_the_claimed_gpu_refuses_what_a_gpu_would(claimed_gpu: None) -> None:
    here, there = torch.ones(3), torch.ones(3, device=GPU)
    assert there.device == GPU and (2 * there.to(CPU)).device == CPU
    assert here.to(there).device == GPU and there.sum().device == GPU
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    with pytest.raises(TypeError):
        there.numpy()


def head_by(device: str, array: np.ndarray, **options: Any) -> HeadLabels:
    kind = options.get("input_kind", "logits")
    matrix = Matrix(array.shape, lambda rows: array[rows], "scores")
    keys = [str(row) for row in range(len(array))]
    opened = Scores([matrix], keys, np.arange(len(array)), None)
    settings = LabelSettings(**{"input_kind": kind} | options)
    return label(opened, "here", settings, device=device).heads[0]


def same(one: HeadLabels, other: HeadLabels) -> bool:
    return bool((one.labels_N == other.labels_N).all())


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "sinkhorn"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_the_label_solve_mixes_no_devices(
    claimed_gpu: None, solver: str, dtype: type, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Annealed, sharpened and balanced, on a GPU by its own account: where the rows that are
    looked at stay there, and where they are kept in memory."""
    balanced = assignment.balanced
    monkeypatch.setattr(
        assignment, "balanced", lambda *given, **how: balanced(*given, **how | {"memory": memory})
    )
    array = scores(1000, 8).astype(dtype)
    options = {"solver": solver, "tol": 1e-6, "lamb": 5.0}
    on_gpu, on_cpu = (head_by(device, array, **options) for device in ("cuda", "cpu"))
    assert on_gpu.attributes["status"] == "converged" and same(on_gpu, on_cpu)
    np.testing.assert_allclose(on_gpu.potentials_K, on_cpu.potentials_K, atol=1e-4)


def test_samples_and_dead_clusters_mix_no_devices(claimed_gpu: None) -> None:
    array = scores(40_000, 16).astype(np.float32)
    array[:, 3] -= 400
    on_gpu, on_cpu = (head_by(device, array, assign="argmax") for device in ("cuda", "cpu"))
    assert on_gpu.attributes["converged"]
    assert (on_gpu.labels_N == on_cpu.labels_N).mean() > 0.999


def test_rows_that_do_not_fit_are_sent_tile_by_tile(
    claimed_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = scores(3000, 12).astype(np.float16)
    kept = head_by("cuda", array)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    sent = head_by("cuda", array)
    assert same(kept, sent) and kept.potentials_K.tolist() == sent.potentials_K.tolist()
    assert kept.attributes["bytes-read"] == array.nbytes < sent.attributes["bytes-read"]


def test_a_kernel_is_given_rows_as_they_are_stored(
    claimed_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def kernel(tile_nK: Tensor, lamb: float, a_K: Tensor, dtype: torch.dtype) -> Tensor:
        seen.add(tile_nK.dtype)
        tile_nK = tiles.less_maximum(tile_nK, torch.float64)
        return torch.softmax(lamb * tile_nK + a_K.to(tile_nK), 1).sum(0)

    array = scores(3000, 12).astype(np.float16)
    without = head_by("cuda", array)
    monkeypatch.setattr(semidual, "_kernel", lambda device: kernel)
    assert same(head_by("cuda", array), without) and seen == {torch.float16}


def test_features_become_scores_on_the_gpu(claimed_gpu: None) -> None:
    rng = np.random.default_rng(0)
    features_ND = rng.standard_normal((3000, 8)).astype(np.float16)
    weights = [rng.standard_normal((clusters, 8)).astype(np.float32) for clusters in (5, 9)]
    found = {}
    for device in ("cuda", "cpu"):
        features = Features(Matrix(features_ND.shape, lambda rows: features_ND[rows], "features"))
        heads: list[Matrix] = [
            Product(features, weight_KD, np.ones(len(weight_KD), np.float32), "head")
            for weight_KD in weights
        ]
        keys = [str(row) for row in range(3000)]
        opened = Scores(heads, keys, np.arange(3000), None, features)
        found[device] = label(opened, "here", LabelSettings(), device=device).heads
        assert features.kept_ND is not None and features.kept_ND.device.type == device
    assert all(same(*pair) for pair in zip(found["cuda"], found["cpu"], strict=True))


def test_what_only_a_gpu_does_agrees_with_the_processor() -> None:
    rows = InMemory.of(rows_of(scores(500, 9)))
    a_K = torch.linspace(-1, 1, 9, dtype=torch.float64)
    dense, other = laplacian(rows, 2.0, a_K, False), semidual._laplacian_on_device(rows, 2.0, a_K)
    torch.testing.assert_close(other, dense, rtol=0, atol=2e-3)
    torch.testing.assert_close(other.sum(1), torch.zeros(9).double(), rtol=0, atol=1e-12)
    labels_N = np.random.default_rng(0).integers(0, 8, 500)
    loss_KK = np.full((9, 9), np.inf)
    assignment._least_losses(rows, labels_N, loss_KK)
    np.testing.assert_array_equal(assignment._least_losses_on_device(rows, labels_N), loss_KK)
