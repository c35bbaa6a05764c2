"""Real data, where it is there: a classifier's probabilities, photographs, annotated images."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from torch import arange

from sela_cli import formats, metrics
from sela_cli.images.batches import open_images
from sela_cli.images.sources import open_source
from sela_cli.labels import LabelSettings, label_stage


@pytest.fixture
def probabilities(shared_data: Path) -> Path:
    """Predictions of a real classifier on the CIFAR-10 test set, (10000, 10)."""
    return shared_data / "cifar10-test-probabilities.npy"


def test_balancing_a_classifier_costs_no_accuracy(
    probabilities: Path, shared_data: Path, tmp_path: Path
) -> None:
    """The test set has 1,000 images a class: knowing that can only help."""
    truth_N = np.load(shared_data / "cifar10-test-labels.npy")
    plain = float((np.load(probabilities).argmax(1) == truth_N).mean())
    output = str(tmp_path / "labels.h5")
    labels = label_stage(str(probabilities), output, LabelSettings(input_kind="probabilities"))
    head = labels.heads[0]
    assert head.attributes["converged"]
    assert head.usage_K.tolist() == [1000] * 10
    scores = metrics.compare(
        formats.read_labels(output), str(shared_data / "cifar10-test-labels.npy")
    )[0]
    assert scores["accuracy"] >= plain
    gap = head.attributes["objective"] - head.attributes["lower-bound"]
    assert -1e-12 <= gap <= 1e-3 * head.attributes["objective"]


def test_balanced_labels_of_real_predictions_are_optimal(
    probabilities: Path, tmp_path: Path
) -> None:
    """On 800 rows scipy's Hungarian method is the judge."""
    part_NK = np.load(probabilities)[:800]
    np.save(tmp_path / "part.npy", part_NK)
    settings = LabelSettings(input_kind="probabilities")
    labels = label_stage(str(tmp_path / "part.npy"), str(tmp_path / "labels.h5"), settings)
    logs_NK = np.log(np.maximum(part_NK, np.finfo(np.float64).tiny))
    logs_NK -= np.log(np.exp(logs_NK).sum(1, keepdims=True))
    cost_NN = np.repeat(-logs_NK, 80, axis=1)
    rows, seats = linear_sum_assignment(cost_NN)
    best = cost_NN[rows, seats].mean()
    objective = labels.heads[0].attributes["objective"]
    assert best - 1e-9 <= objective <= 1.001 * best


def test_photographs_of_a_tar_and_of_its_folder_are_the_same_images(
    shared_data: Path, tmp_path: Path
) -> None:
    archive = shared_data / "imagenette-mini.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    packed, _ = open_images(str(archive), 64, limit=12)
    folder, _ = open_images(str(tmp_path), 64, limit=12)
    assert packed.keys == folder.keys
    assert packed.truth_N is None or len(packed.truth_N) == 12
    for one, two in zip(packed.batch(arange(12)), folder.batch(arange(12)), strict=True):
        assert bool((one == two).all())


def test_voc_opens_by_name(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "voc2007-mini.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    source = open_source(f"voc2007:{tmp_path}@trainval")
    assert len(source) == 300 and source.truth_N is None
    assert source.image(0).ndim == 3


def test_labels_name_their_rows(probabilities: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "labels.h5")
    label_stage(
        str(probabilities),
        output,
        LabelSettings(input_kind="probabilities", assign="argmax"),
        csv_path=str(tmp_path / "labels.csv"),
    )
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    read = formats.read_labels(output)
    assert lines[0] == "key,label" and len(lines) == 10_001
    assert lines[1:3] == [f"{row},{read.heads[0].labels_N[row]}" for row in (0, 1)]
