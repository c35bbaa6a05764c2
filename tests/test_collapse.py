"""The signs of a collapse, by closed forms and by predictions that are made to collapse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from sela_cli import collapse, interrupt, tiles
from sela_cli.errors import StoppedEarly
from sela_cli.scores import Matrix, Which

WriteLogits = Callable[..., str]
WELL = {"churn": 0.2, "empty": 0, "entropy": 0.5, "spread": 0.95, "unwanted": 0.1}


def problems(loss: float = 1.0, progress: float = 0.6, **row: float) -> set[str]:
    return set(collapse.problems(WELL | row, loss, math.log(10), progress))


def test_predictions_are_the_entropies_of_the_softmax(write_logits: WriteLogits) -> None:
    logits_NK = np.random.default_rng(0).normal(size=(50, 6)) * 3
    p_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(1, keepdims=True)
    got = collapse.predictions(write_logits(logits_NK))
    assert got["entropy"] == pytest.approx(entropy(p_NK, axis=1, base=6).mean(), rel=1e-5)
    assert got["spread"] == pytest.approx(entropy(p_NK.mean(0), base=6), rel=1e-5)
    assert got["unwanted"] == np.isin(range(6), p_NK.argmax(1), invert=True).mean()


def test_predictions_are_those_of_the_heads(write_logits: WriteLogits) -> None:
    """Means, and the worst spread: of heads of other sizes, and with other levels."""
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(50, clusters)) * 3 + clusters for clusters in (6, 3, 9)]
    heads[2][:, 4] -= 99
    paths = [write_logits(head, name=f"{number}.h5") for number, head in enumerate(heads)]
    alone = [collapse.predictions(path) for path in paths]
    over_heads = {"entropy": np.mean, "spread": min, "unwanted": np.mean}
    expected = {name: of([each[name] for each in alone]) for name, of in over_heads.items()}
    assert alone[0]["spread"] != alone[1]["spread"] and alone[2]["unwanted"] == 1 / 9
    assert collapse.predictions(write_logits(*heads)) == pytest.approx(expected)


def test_one_collapsed_head_of_ten_is_told(write_logits: WriteLogits) -> None:
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(80, 5)) for _ in range(9)]
    heads.append(np.eye(5)[np.zeros(80, int)] * 99)
    row = WELL | collapse.predictions(write_logits(*heads))
    assert set(collapse.problems(row, 1.0, math.log(5), 0.6)) == {"few clusters predicted"}


def test_a_signal_stops_the_reading_of_predictions(
    write_logits: WriteLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_logits(np.eye(23)[:, :4])
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", 12)
    monkeypatch.setattr(tiles, "_SPAN_ELEMENTS", 20)
    polls = itertools.count(1)
    monkeypatch.setattr(interrupt, "requested", lambda: next(polls) == 2)
    with pytest.raises(StoppedEarly, match=path):
        collapse.predictions(path)
    assert next(polls) == 3


def test_predictions_do_not_depend_on_tiles(
    write_logits: WriteLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_logits(*np.random.default_rng(0).normal(size=(2, 23, 4)))
    whole = collapse.predictions(path)
    monkeypatch.setattr(tiles, "_TILE_ELEMENTS", 12)
    monkeypatch.setattr(tiles, "_SPAN_ELEMENTS", 20)
    assert collapse.predictions(path) == pytest.approx(whole)


def test_of_many_images_some_are_looked_at(
    write_logits: WriteLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that repeat have the means of any few of them; the other rows are not read."""
    monkeypatch.setattr(collapse, "_ROWS", 60)
    read: list[int] = []
    tensor = Matrix.tensor

    def counted(matrix: Matrix, rows: Which, device: torch.device) -> torch.Tensor:
        found_nK = tensor(matrix, rows, device)
        read.append(len(found_nK))
        return found_nK

    monkeypatch.setattr(Matrix, "tensor", counted)
    pattern_NK = np.random.default_rng(0).normal(size=(3, 4)) * 3
    expected = collapse.predictions(write_logits(pattern_NK))
    read.clear()
    path = write_logits(np.repeat(pattern_NK, 400, axis=0), name="many.h5")
    assert collapse.predictions(path) == pytest.approx(expected, rel=0.02)
    # 32 for each of the four clusters are more than 60.
    assert sum(read) == 128


def test_extremes(write_logits: WriteLogits) -> None:
    nothing = collapse.predictions(write_logits(np.zeros((8, 4))))
    assert nothing == pytest.approx({"entropy": 1, "spread": 1, "unwanted": 0.75})
    one = collapse.predictions(write_logits(np.eye(4)[np.zeros(8, int)] * 99, name="one.h5"))
    assert one == pytest.approx({"entropy": 0, "spread": 0, "unwanted": 0.75})
    each = collapse.predictions(write_logits(np.eye(4)[np.arange(8) % 4] * 99, name="each.h5"))
    assert each == pytest.approx({"entropy": 0, "spread": 1, "unwanted": 0})
    alone = collapse.predictions(write_logits(np.zeros((8, 1)), name="alone.h5"))
    assert alone == pytest.approx({"entropy": 0, "spread": 1, "unwanted": 0})


def test_a_healthy_round_has_no_problem() -> None:
    assert not problems()


def test_each_problem_is_told_by_name() -> None:
    assert problems(loss=0.995 * math.log(10)) == {"loss about ln K"}
    assert problems(spread=0.1, unwanted=0.9) == {"few clusters predicted"}
    assert problems(unwanted=0.9) == {"clusters nobody wants"}
    assert problems(empty=3) == {"empty clusters"}
    assert problems(churn=0.97) == {"labels do not settle"}


def test_a_start_is_slow() -> None:
    slow = {"loss": math.log(10), "spread": 0.1, "churn": 0.99, "unwanted": 0.9}
    assert not problems(progress=0.05, **slow)
    assert not problems(progress=0.3, churn=0.99)


def test_advice_names_an_option() -> None:
    row = WELL | {"churn": 0.99, "empty": 1, "spread": 0.1}
    advice = collapse.problems(row, math.log(10), math.log(10), 0.9)
    assert len(advice) == 4 and all("--" in text for text in advice.values())
