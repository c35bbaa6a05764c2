"""Many processes as one: the same steps, losses, logits and probes, up to rounding.

Two processes with gloo do it all once; this one does the same alone.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from sela_cli import batchwide, cli, formats, interrupt, job, loop, networks, parallel, probes
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, StoppedEarly, UsageError
from sela_cli.fresh import make_ready, settle
from sela_cli.images.augment import AUGMENTATIONS, draw
from sela_cli.images.batches import Images, open_images
from sela_cli.locks import locked
from sela_cli.logits import embed_stage, forward
from sela_cli.networks import Network, build
from sela_cli.options import device_name
from sela_cli.probes import LinearProbe, LinearRecipe
from sela_cli.recipe import Recipe
from sela_cli.run_settings import settings_of
from sela_cli.scores import open_scores
from sela_cli.training import Trainer
from sela_cli.unfinished import Unfinished

PROCESSES = 2
TINY_RUN = (
    "run --data digits --limit 60 --arch alexnet-small --image-size 16 --heads 5x2 --epochs 2 "
    "--opts 3 --batch-size 20 --precision float32 --device cpu --json"
)
# 25 images a batch: the parts of two processes differ.
RECIPE = Recipe(epochs=2, batch_size=25, lr=0.05, aug="strong", rotation=True)


def values() -> Tensor:
    return torch.randn(7, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def normed(norm: nn.Module, mine: slice) -> dict[str, Tensor]:
    """Output, gradients and statistics of a BatchNorm that sees a part of `values`."""
    x = values()[mine].requires_grad_()
    y = norm(x)
    (y * torch.arange(y[0].numel()).view(y[0].shape)).pow(2).sum().backward()
    assert x.grad is not None
    gradients = [parameter.grad for parameter in norm.parameters()]
    for gradient in gradients:
        assert gradient is not None
        parallel.sum_of(gradient)
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    return {"y": y.detach(), "x": x.grad, "weight": gradients[0], "bias": gradients[1], **state}


def stopped_twice(
    images: Images, network: Network, recipe: LinearRecipe, folder: Path
) -> dict[tuple[str, float], float]:
    """The losses of a probe that goes on from its first step, and again from its second."""

    def fit() -> dict[tuple[str, float], float]:
        unfinished = Unfinished(str(folder / "probe.h5"), "probe", {})
        with LinearProbe(network, ["conv2", "conv5"], 10, recipe, "cpu", "float32") as probe:
            return probe.fit(images, lambda *_: None, unfinished)

    # Only one of the processes is asked to stop, and it is not the one that writes.
    asked = parallel.rank() == parallel.size() - 1
    with mock.patch.object(interrupt, "requested", lambda: asked):
        for step in (1, 2):
            with pytest.raises(StoppedEarly, match=f"step {step} of 4"):
                fit()
    return fit()


def everything(folder: Path) -> dict[str, Any]:
    """What this process, or all of its job, makes of 60 digits."""
    networks._FILTERS["alexnet-small"] = (8, 12, 12, 12, 8)
    torch.set_num_threads(1)
    images, _ = open_images("digits", 32, limit=60)
    network, fitted = (build("alexnet-small", 32, [5, 8], 3, rotation=True) for _ in range(2))
    settle(network, images, RECIPE)
    make_ready(fitted, images, replace(RECIPE, head_init="kmeans"))
    trainer = Trainer(network, RECIPE)
    labels_TN = [torch.arange(60) % clusters for clusters in (5, 8)]
    trainer.run(images, labels_TN, 4, lambda: None)
    generator = torch.Generator().manual_seed(5)

    def augment(count: int, size: int) -> Any:
        return draw(count, size, AUGMENTATIONS["strong"], generator)

    logits = [
        torch.cat(blocks)
        for blocks in zip(
            *forward(network, images, 13, augment=augment, views=2, features=False),
            strict=True,
        )
    ]
    recipe = LinearRecipe(epochs=2, lrs=(0.01, 0.1), batch_size=25)
    with LinearProbe(network, ["conv2", "conv5"], 10, recipe, "cpu", "float32") as probe:
        loss = probe.fit(images, lambda *_: None, Unfinished("-", "probe", {}))
        classifier = probe.classifiers["conv5"][1].weight.detach().clone()  # type: ignore[index]
        accuracies = probe.accuracies(images, {"conv2": [0.01, 0.1], "conv5": [0.1]})
    resumed = stopped_twice(images, network, recipe, folder)
    # Of a network that no process has rounded otherwise.
    start, bank = build("alexnet-small", 32, [5], 3), images.subset(np.arange(40))
    with mock.patch.object(probes, "_ROWS", 7):
        nearest = probes.knn_rows(bank, images, start, probes.KnnRecipe((1, 5), (0.1,), 8))
    return {
        "losses": trainer.losses,
        "settled": fitted.arrays(),
        "model": network.arrays(),
        "logits": logits,
        "classifier": classifier,
        "probe": [loss[name] for name in sorted(loss)],
        "resumed": [resumed[name] for name in sorted(loss)],
        "accuracies": accuracies,
        "nearest": [(row["setting"], row["top1"], row["top5"]) for row in nearest],
    }


def without_room(folder: Path) -> list[str]:
    """How embedding ends where the file can't grow: as it is opened, filled and sealed."""
    images, _ = open_images("digits", 32, limit=8)
    network, output = build("alexnet-small", 32, [5], seed=0), folder / "whole.h5"
    embed_stage(images, network, str(output), Provenance("test", {}), batch_size=3)
    size, ends = output.stat().st_size, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 96, size // 4, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            embed_stage(images, network, str(folder / "a.h5"), Provenance("test", {}), batch_size=3)
        except (CannotCreate, job.FailedElsewhere) as error:
            ends.append(type(error).__name__)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ends


def process(rank: int, folder: str) -> None:
    """One of the two."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(minutes=5),
    )
    mine = job.share(7)
    result = {"norm": normed(batchwide.BatchNorm2d(3), mine), **everything(Path(folder))}
    sums = [parallel.any_of(rank == 1), parallel.any_of(False), parallel.size()]

    def failing() -> None:
        (Path(folder) / "touched").open("x").close()
        raise BadData("no")

    try:
        job.once(failing)
    except (BadData, job.FailedElsewhere) as error:
        sums.append((type(error).__name__, error.exit_code))
    try:
        Trainer(build("alexnet-small", 32, [5], 0), Recipe(batch_size=1)).run(
            open_images("digits", 32, limit=4)[0], [torch.zeros(4, dtype=torch.long)], 1, print
        )
    except UsageError as error:
        sums.append(str(error))
    result["ends"] = without_room(Path(folder))
    torch.save({"mine": mine, "sums": sums, **result}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes came to."""
    folder = tmp_path_factory.mktemp("job")
    multiprocessing.spawn(process, (str(folder),), PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to."""
    before = networks._FILTERS["alexnet-small"]
    try:
        return everything(tmp_path_factory.mktemp("alone"))
    finally:
        networks._FILTERS["alexnet-small"] = before


def close(one: Any, two: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), atol=atol, rtol=1e-4)


@pytest.mark.slow
def test_batch_norm_is_that_of_the_whole_batch(both: list[dict[str, Any]]) -> None:
    """torch's own BatchNorm over all rows is the yardstick: outputs, gradients, statistics."""
    whole = normed(nn.BatchNorm2d(3), slice(0, 7))
    for part in both:
        for name in ("y", "x"):
            close(part["norm"][name], whole[name][part["mine"]])
        for name in set(whole) - {"y", "x"}:
            close(part["norm"][name], whole[name])


@pytest.mark.slow
def test_two_processes_train_as_one(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for part in both:
        close(part["losses"], alone["losses"])
        for group in ("settled", "model"):
            for name, array in alone[group].items():
                close(part[group][name], array)


@pytest.mark.slow
def test_two_processes_embed_and_probe_as_one(
    both: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for part in both:
        for one, two in zip(part["logits"], alone["logits"], strict=True):
            close(one, two)
        close(part["probe"], alone["probe"], atol=1e-4)
        close(part["classifier"], alone["classifier"], atol=1e-4)
        assert part["accuracies"].keys() == alone["accuracies"].keys()
        for name, accuracies in alone["accuracies"].items():
            close(part["accuracies"][name], accuracies)
        assert part["nearest"] == alone["nearest"]


@pytest.mark.slow
def test_a_stopped_probe_goes_on_exactly(both: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for part in (*both, alone):
        assert part["resumed"] == part["probe"]


@pytest.mark.slow
def test_a_job_agrees_and_fails_as_one(both: list[dict[str, Any]]) -> None:
    first, second = (part["sums"] for part in both)
    assert first[:3] == second[:3] == [True, False, PROCESSES]
    assert (first[3], second[3]) == (("BadData", 65), ("FailedElsewhere", 65))
    assert "--batch-size" in first[4] and first[4] == second[4]


def refused(rank: int, folder: str) -> None:
    """One of two that are to run in a folder where another run is at work."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    watcher = loop.Watcher(lambda title: nullcontext(print), print)
    settings = settings_of("digits", 16, {"arch": "alexnet-small", "heads": "4x1"})
    try:
        loop.run(open_images("digits", 16, limit=4)[0], Path(folder) / "run", settings, watcher)
    except Exception as error:
        (Path(folder) / f"{rank}.txt").write_text(type(error).__name__)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_job_is_refused_as_one_where_another_run_is_at_work(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock"):
        multiprocessing.spawn(refused, (str(tmp_path),), PROCESSES)
    kinds = [(tmp_path / f"{rank}.txt").read_text() for rank in range(PROCESSES)]
    assert kinds == ["CannotCreate", "FailedElsewhere"]


@pytest.mark.slow
def test_a_full_disk_ends_embedding_in_every_process(both: list[dict[str, Any]]) -> None:
    first, second = (part["ends"] for part in both)
    assert first == ["CannotCreate"] * 5 and second == ["FailedElsewhere"] * 5


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_shares_are_all_of_it(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing is one process's, in order; no process has two more than another."""
    monkeypatch.setattr(parallel, "size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(range(count)[job.share(count)])
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert job.largest_share(count) == max(map(len, shares))


def test_only_torchrun_starts_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system's RANK and WORLD_SIZE alone are none."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with job.joined():
        assert job.number() == 0 and parallel.size() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert job.number() == 3


def test_a_job_reads_no_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each process would get some of it. One that is started alone may read it."""
    pipe = io.BytesIO(b"all of it")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for world_size, taken in (("2", False), ("1", True)):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        with pytest.raises(BadData if taken else UsageError), open_scores("-"):
            pass
        assert (pipe.tell() > 0) == taken
    assert not list(tmp_path.iterdir())


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine of two GPUs, as torch would tell of it; grows with what is made current."""
    made_current: list[torch.device] = []

    def empty(size: int, device: str) -> SimpleNamespace:
        found = torch.device(device)
        if found.type == "cuda" and (found.index or 0) > 1:
            raise RuntimeError("CUDA error: invalid device ordinal\nmore of it")
        return SimpleNamespace(device=found)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    return made_current


def one_of_three(monkeypatch: pytest.MonkeyPatch, local: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_every_process_has_a_gpu_of_its_own(
    asked: str, two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_name(asked) == "cuda"
    two_gpus.clear()
    for local in (0, 1):
        one_of_three(monkeypatch, local)
        assert device_name(asked) == f"cuda:{local}"
    assert two_gpus == [torch.device("cuda:0"), torch.device("cuda:1")]
    one_of_three(monkeypatch, 2)
    with pytest.raises(UsageError, match=r"--device cuda:2: CUDA error: invalid device ordinal$"):
        device_name(asked)
    assert device_name("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda:1 is one GPU for several processes"):
        device_name("cuda:1")
    # Machines of one GPU each.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device_name("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:7",
            "another process of the job has failed",
        ),
        (
            "NCCL error in: Group.cpp:9, invalid usage\nLast error:\nDuplicate GPU: rank 0 and 1",
            "the processes of the job can't work together: Duplicate GPU: rank 0 and 1",
        ),
    ],
)
def test_processes_that_cannot_talk_say_why(
    error: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_of_three(monkeypatch, 0)
    assert cli._unforeseen(RuntimeError(error)) == (line, 1)


@pytest.mark.slow
def test_torchrun_runs_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `sela run`, by two processes and by one: equal labels, one voice."""
    line = TINY_RUN.split()
    monkeypatch.setattr(interrupt, "listen", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sela", *line, "--out", str(tmp_path / "one")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "sela_cli", *line, "--out", "two"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stderr.count("round 1/2") == 1
    for name in ("labels-000.h5", "labels-001.h5", "labels.h5"):
        one, two = (formats.read_labels(str(tmp_path / run / name)) for run in ("one", "two"))
        for left, right in zip(one.heads, two.heads, strict=True):
            assert (left.labels_N == right.labels_N).mean() > 0.9
    one, two = (
        formats.read_checkpoint(str(tmp_path / run / "checkpoint.h5")) for run in ("one", "two")
    )
    np.testing.assert_allclose(one.losses, two.losses, atol=1e-4)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        path.name for path in (tmp_path / "two").iterdir()
    }
