"""Stage 1: the logits file holds what the network gives for the centre views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sela_cli import formats, interrupt
from sela_cli.errors import CannotCreate, StoppedEarly
from sela_cli.formats import Provenance
from sela_cli.images.augment import centre_view
from sela_cli.images.batches import Images, open_images
from sela_cli.logits import embed_stage, plan
from sela_cli.networks import Network, build

HEADS = [7, 5]


@pytest.fixture(scope="module")
def images() -> Images:
    return open_images("digits", 32, limit=13)[0]


@pytest.fixture
def network() -> Network:
    """Left in training mode, with statistics unlike a fresh network's."""
    network = build("alexnet-small", 32, HEADS, seed=0).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(0.1)
            module.running_var.fill_(0.5)
    return network


@torch.no_grad()
def direct(network: Network, images: Images) -> list[np.ndarray]:
    network.eval()
    view = centre_view(images.batch(torch.arange(len(images))), 32)
    return [logits.numpy() for logits in network(view)]


def embedded(images: Images, network: Network, path: Path, **options: Any) -> dict[str, np.ndarray]:
    provenance = Provenance("test", {}, dataset_id=images.dataset_id)
    embed_stage(images, network, str(path), provenance, **options)
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return arrays


@pytest.mark.parametrize("batch_size", [1, 4, 13, 256])
def test_logits_are_those_of_the_network(
    batch_size: int, images: Images, network: Network, tmp_path: Path
) -> None:
    arrays = embedded(images, network, tmp_path / "a.h5", batch_size=batch_size)
    for head, expected in enumerate(direct(network, images)):
        np.testing.assert_allclose(arrays[f"logits/{head}"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(arrays["index"], images.index_N)
    assert [key.decode() for key in arrays["keys"]] == images.keys


def test_network_is_left_as_it_was(images: Images, network: Network, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    embedded(images, network, tmp_path / "a.h5", batch_size=5)
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_factored_form_gives_the_logits(images: Images, network: Network, tmp_path: Path) -> None:
    arrays = embedded(images, network, tmp_path / "a.h5", store="features")
    assert arrays["features"].shape == (13, network.width)
    for head, expected in enumerate(direct(network, images)):
        weight_KD, bias_K = (arrays[f"heads/{head}/{name}"] for name in ("weight", "bias"))
        logits = arrays["features"] @ weight_KD.T + bias_K
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_relative_to_the_largest(
    images: Images, network: Network, tmp_path: Path
) -> None:
    """Logits around 3000, which half precision knows to +-1, keep their differences."""
    with torch.no_grad():
        for head in network.heads:
            head.weight.mul_(100)
            head.bias.fill_(3000)
    arrays = embedded(images, network, tmp_path / "a.h5", dtype="float16")
    for head, expected in enumerate(direct(network, images)):
        stored = arrays[f"logits/{head}"]
        assert stored.dtype == np.float16 and (stored.max(axis=1) == 0).all()
        np.testing.assert_array_equal(stored.argmax(1), expected.argmax(1))
        shifted = expected - expected.max(axis=1, keepdims=True)
        np.testing.assert_allclose(stored, shifted, rtol=2**-10, atol=2e-3)


def test_bfloat16_is_close_but_not_equal(images: Images, network: Network, tmp_path: Path) -> None:
    arrays = embedded(images, network, tmp_path / "a.h5", precision="bfloat16")
    expected = direct(network, images)[0]
    assert not np.array_equal(arrays["logits/0"], expected)
    np.testing.assert_allclose(arrays["logits/0"], expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("store", ["logits", "features"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plan_tells_the_size(
    store: str, dtype: str, images: Images, network: Network, tmp_path: Path
) -> None:
    arrays = embedded(images, network, tmp_path / "a.h5", store=store, dtype=dtype)
    nbytes = sum(array.nbytes for name, array in arrays.items() if name not in ("index", "keys"))
    assert plan(images, network, store, dtype)["megabytes"] == pytest.approx(nbytes / 1e6)


def test_embedding_twice_gives_one_digest(images: Images, network: Network, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        embedded(images, network, tmp_path / name)
    digests = {formats.read_header(str(tmp_path / name)).digest for name in ("a.h5", "b.h5")}
    assert len(digests) == 1


def test_existing_output_is_kept(images: Images, network: Network, tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("mine")
    with pytest.raises(CannotCreate, match="--force"):
        embedded(images, network, tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_text() == "mine"
    embedded(images, network, tmp_path / "a.h5", force=True)


def test_stopped_embedding_leaves_nothing(
    images: Images, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly, match="after 4 images"):
        embedded(images, network, tmp_path / "a.h5", batch_size=4)
    assert not list(tmp_path.iterdir())
