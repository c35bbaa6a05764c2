"""Files written by the first release of each schema version are read for ever."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from sela_cli import envelope, formats
from sela_cli.images.sources import open_source
from sela_cli.keys import dataset_id
from sela_cli.labels import summary
from sela_cli.scores import open_scores

DATA = Path(__file__).with_name("data")
KEYS = ["a/1.jpg", "a/2.jpg", "b/é.png"]


@pytest.mark.parametrize("path", sorted(DATA.glob("v*.h5")), ids=lambda path: path.stem)
def test_header_and_digest_still_hold(path: Path) -> None:
    header = envelope.read_header(str(path))
    assert header.kind == path.stem.split("-")[1].replace("features", "logits")
    assert header.dataset_id == dataset_id(KEYS)
    with h5py.File(path) as file:
        assert envelope.payload_digest(file) == header.digest


def test_version_1_logits() -> None:
    with open_scores(str(DATA / "v1-logits.h5")) as scores:
        assert scores.keys == KEYS and scores.index_N.tolist() == [0, 2, 5]
        rows = [head.read(slice(0, 3)) for head in scores.heads]
    np.testing.assert_array_equal(rows[0], np.arange(6).reshape(3, 2) / 4)
    np.testing.assert_array_equal(rows[1], np.arange(9).reshape(3, 3) / 8)


def test_version_1_features_with_heads() -> None:
    features_ND = np.arange(12).reshape(3, 4) / 16
    with open_scores(str(DATA / "v1-features.h5")) as scores:
        rows = scores.heads[0].read(slice(0, 3))
    np.testing.assert_array_equal(rows, features_ND[:, :2] + [0.5, -0.5])


def test_version_1_labels() -> None:
    labels = formats.read_labels(str(DATA / "v1-labels.h5"))
    head = labels.heads[0]
    assert head.labels_N.tolist() == [0, 1, 1] and head.potentials_K.tolist() == [0.5, -0.5]
    assert head.attributes["assign"] == "balanced" and head.attributes["converged"]
    assert head.trace["residual"].tolist() == [0.25, 5e-5]
    # It does not know yet how many bytes were read.
    assert "head 0: " in summary(labels, "labels.h5")[1]


def test_version_1_checkpoint() -> None:
    checkpoint = formats.read_checkpoint(str(DATA / "v1-checkpoint.h5"))
    assert (checkpoint.arch, checkpoint.heads, checkpoint.step) == ("alexnet", [2, 3], 7)
    assert checkpoint.model["w"].tolist() == [[0, 1], [2, 3]] and checkpoint.model["n"] == 3
    assert checkpoint.losses.tolist() == [1.5, 1.25]


def test_version_1_probe() -> None:
    row = formats.read_probe(str(DATA / "v1-probe.h5"))[0]
    assert (row["layer"], row["method"], row["top1"], row["n"]) == ("conv1", "knn", 0.5, 3)


def test_version_1_images() -> None:
    source = open_source(str(DATA / "v1-images.h5"))
    assert source.keys == KEYS and source.classes == ("a", "b")
    assert source.truth_N is not None and source.truth_N.tolist() == [0, 0, 1]
    channels_last = np.arange(36).reshape(3, 3, 2, 2).transpose(0, 2, 3, 1)
    for number, image in enumerate(channels_last):
        np.testing.assert_array_equal(source.image(number), image)


def test_version_1_finetune() -> None:
    (row,) = formats.read_precisions(str(DATA / "v1-finetune.h5"))
    assert row == {"class": "bird", "positives": 3, "ap11": 0.5, "ap": 0.25}


def test_every_kind_has_a_file() -> None:
    kinds = {envelope.read_header(str(path)).kind for path in DATA.glob("v1-*.h5")}
    assert kinds == set(envelope.KINDS)
