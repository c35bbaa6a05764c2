"""Shared fixtures: the command line as a process, tiny files, real data where it is there."""

from __future__ import annotations

import os

# One thread a process, before torch is loaded: networks this small gain nothing from more,
# and lose a lot on a machine whose cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sela_cli import envelope, formats
from sela_cli.keys import dataset_id

SHARED = Path(os.environ.get("SELA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

Sela = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def sela(tmp_path: Path) -> Sela:
    """Run `sela ARGS` in tmp_path; fails the test unless it exits with `code`."""

    def call(
        *arguments: object, code: int = 0, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "sela_cli", *map(str, arguments)],
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            env={**os.environ, **(env or {})},
            timeout=600,
        )
        assert done.returncode == code, (
            f"exit {done.returncode}, wanted {code}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        )
        return done

    return call


@pytest.fixture
def write_logits(tmp_path: Path) -> Callable[..., str]:
    """Write a logits file of the given (N, K) arrays, one a head; returns its path."""

    def write(*heads_NK: np.ndarray, name: str = "logits.h5", keys: list[str] | None = None) -> str:
        path = str(tmp_path / name)
        keys = keys or [f"image/{row}" for row in range(len(heads_NK[0]))]
        provenance = envelope.Provenance("test", {}, dataset_id=dataset_id(keys))
        columns = {f"logits/{head}": array.shape[1] for head, array in enumerate(heads_NK)}
        with formats.create_logits(
            path, keys, np.arange(len(keys)), provenance, columns=columns, dtype="float32"
        ) as datasets:
            for item, array in zip(datasets.values(), heads_NK, strict=True):
                item[:] = array
        return path

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}: set SELA_TEST_DATA to its folder")
    return SHARED
