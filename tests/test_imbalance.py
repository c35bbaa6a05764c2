"""examples/imbalance.py: the shares of the classes, and a short run of both methods."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from sela_cli.images.batches import open_images

SCRIPT = Path(__file__).parents[1] / "examples" / "imbalance.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("imbalance", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shares_of_the_classes(script: ModuleType) -> None:
    images, _ = open_images("digits", 16)
    assert images.truth_N is not None
    whole = np.bincount(images.truth_N)
    sizes = {
        name: np.bincount(script.imbalanced(images, name, seed=0).truth_N)
        for name in script.IMBALANCES
    }
    np.testing.assert_array_equal(sizes["none"], whole)
    np.testing.assert_array_equal(sizes["light"][:-1], whole[:-1])
    assert sizes["light"][-1] == round(whole[-1] / 2)
    np.testing.assert_allclose(sizes["heavy"] / whole, np.arange(1, 11) / 10, atol=0.01)


@pytest.mark.slow
def test_a_short_run(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "IMBALANCES", ("heavy",))
    short = "--data digits --limit 100 --heads 10,12 --epochs 1 --rounds 1 --out"
    monkeypatch.setattr(sys, "argv", ["imbalance.py", *short.split(), str(tmp_path / "runs")])
    script.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["heavy", "balanced"], ["heavy", "kmeans"]]
    assert all(0 <= float(value) <= 1 for row in rows for value in row[3:])


@pytest.mark.parametrize(
    ("data", "taken", "told"),
    [
        ("nowhere", False, "nowhere"),
        ("plain", False, "no true classes"),
        ("digits", True, "exists"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    data: str,
    taken: bool,
    told: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("plain/a.png")
    if taken:
        Path("runs/light-kmeans").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["imbalance.py", "--data", data, "--out", "runs"])
    with pytest.raises(SystemExit, match=f"error: .*{told}"):
        script.main()
