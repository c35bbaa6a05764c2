"""Some of the scripts in benchmarks/ run, in little; what they measure is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def script(name: str, *arguments: object) -> str:
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_one_of_gpus_runs_without() -> None:
    options = "--device cpu --rows 40 --clusters 8 --repeats 1"
    printed = script("gpu.py", *options.split())
    assert "| torch | float32 |" in printed and "| 40 x 8 |" in printed


def test_training() -> None:
    options = "--cases alexnet-small@32:8 --images 16 --seconds 0.01 --rounds 1 --output -"
    printed = script("train.py", *options.split())
    for stage in ("embed", "train"):
        assert f"| alexnet-small@32:8 | {stage} | plain loop |" in printed
        assert f"- alexnet-small@32:8, {stage}: " in printed


def test_short_runs_of_cifar10(tmp_path: Path) -> None:
    """One, and a page that has its commands."""
    rng = np.random.default_rng(0)
    for number in range(130):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    (tmp_path / "docs").mkdir()
    data = ("--train", tmp_path / "images", "--test", tmp_path / "images", "--out", tmp_path / "r")
    recipe = ("--arch", "alexnet", "--batch=--batch-size 65 --lr 0.001")
    names = ("--names", "opts0", "--seeds", 0, "--epochs", 1)
    script("results.py", "run", "cifar10", *data, *recipe, *names)
    script("results.py", "write", "--out", tmp_path / "r", "--folder", tmp_path / "docs")
    (page,) = (tmp_path / "docs").iterdir()
    assert page.name == "results-cifar10-alexnet-1.md"
    text = page.read_text()
    assert "| network | seeds | kNN | linear conv5 |" in text and "| opts0 | 0 | " in text
    assert "sela run --data TRAIN" in text and str(tmp_path) not in text
