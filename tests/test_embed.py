"""Stage 1: the logits file holds what the network gives for the centre views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sela_cli import envelope, formats, interrupt
from sela_cli.cli import app
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, StoppedEarly, UsageError
from sela_cli.images.augment import DrawOf, centre_view, drawn_view
from sela_cli.images.batches import Images, open_images
from sela_cli.logits import embed_stage, plan
from sela_cli.networks import Network, build
from sela_cli.recipe import Recipe
from sela_cli.run_settings import settings_of
from sela_cli.training import Trainer, label_view

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


def test_heads_are_applied_in_full_precision(
    images: Images, network: Network, tmp_path: Path
) -> None:
    """Lambda times what bfloat16 rounds away of a logit would change labels."""
    logits = embedded(images, network, tmp_path / "a.h5", precision="bfloat16")
    kept = embedded(images, network, tmp_path / "b.h5", precision="bfloat16", store="features")
    for number in range(len(HEADS)):
        weight_KD, bias_K = (kept[f"heads/{number}/{name}"] for name in ("weight", "bias"))
        expected = kept["features"] @ weight_KD.T + bias_K
        np.testing.assert_allclose(logits[f"logits/{number}"], expected, rtol=1e-4, atol=1e-5)


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
    digests = {envelope.read_header(str(tmp_path / name)).digest for name in ("a.h5", "b.h5")}
    assert len(digests) == 1


def test_existing_output_is_kept(images: Images, network: Network, tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("mine")
    with pytest.raises(CannotCreate, match="--force"):
        embedded(images, network, tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_text() == "mine"
    embedded(images, network, tmp_path / "a.h5", force=True)


def test_seed_is_the_checkpoints_unless_given(network: Network, tmp_path: Path) -> None:
    """What the file tells is what its random views were drawn from."""
    state = Trainer(network, Recipe(seed=7)).checkpoint(13)
    formats.write_checkpoint(str(tmp_path / "c.h5"), state, Provenance("test", {}))
    line = f"embed --data digits --limit 13 --checkpoint {tmp_path / 'c.h5'} --device cpu -q"

    def made(*options: str) -> envelope.Header:
        output = str(tmp_path / "a.h5")
        call = [*line.split(), "--view", "random", "--force", "-o", output, *options]
        assert CliRunner().invoke(app, call, catch_exceptions=False).exit_code == 0
        return envelope.read_header(output)

    plain, same, other = made(), made("--seed", "7"), made("--seed", "0")
    assert [each.parameters["seed"] for each in (plain, same, other)] == [7, 7, 0]
    assert plain.digest == same.digest != other.digest


def test_of_several_views_the_mean_is_written(
    images: Images, network: Network, tmp_path: Path
) -> None:
    """Of as many views at a time as a batch has images; the same whenever it is asked for."""

    def augment() -> DrawOf:
        found = label_view("random", Recipe(), 3)
        assert found is not None
        return found

    network.eval()
    means, draw = [], augment()
    for start in range(0, len(images), 4):
        batch = images.batch(torch.arange(start, min(start + 4, len(images))))
        draws = draw(3 * len(batch), network.image_size)
        parts = [draws.of(slice(n * len(batch), (n + 1) * len(batch))) for n in range(3)]
        with torch.no_grad():
            found = [network.logits(network.trunk(drawn_view(batch, 32, part))) for part in parts]
        means.append(torch.stack(found).mean(0))
    first, second = (
        embedded(images, network, tmp_path / name, batch_size=12, augment=augment(), views=3)
        for name in ("a.h5", "b.h5")
    )
    logits_NS = np.hstack([first[f"logits/{head}"] for head in range(len(HEADS))])
    np.testing.assert_allclose(logits_NS, torch.cat(means), rtol=1e-4, atol=1e-6)
    assert all((first[name] == second[name]).all() for name in first)


def test_several_views_are_for_random_ones(tmp_path: Path) -> None:
    line = f"embed --data digits --arch alexnet-small --heads 3 --views 2 -o {tmp_path}/a.h5"
    with pytest.raises(UsageError, match="--view random"):
        CliRunner().invoke(app, line.split(), catch_exceptions=False)
    with pytest.raises(UsageError, match="--view random"):
        settings_of(None, 16, {"views": 2})


def stopped(
    images: Images, network: Network, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "requested", lambda: True)
        with pytest.raises(StoppedEarly, match="stopped after"):
            embedded(images, network, path, **options)


@pytest.fixture
def seen(network: Network) -> list[int]:
    """Rows of each batch that the network is given."""
    rows: list[int] = []
    network.trunk.register_forward_pre_hook(lambda module, views: rows.append(len(views[0])))
    return rows


def test_rows_are_saved_before_the_processes_of_a_job_part(
    images: Images, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[bool] = []
    left = tmp_path / "a.h5.unfinished"
    monkeypatch.setattr("sela_cli.job.meet", lambda: met.append(left.exists()))
    stopped(images, network, tmp_path / "a.h5", monkeypatch, batch_size=4)
    assert met[-1] and not any(met[:-1])


@pytest.mark.parametrize("store", ["logits", "features"])
@pytest.mark.parametrize("view", ["centre", "random"])
def test_stopped_after_every_batch_it_goes_on_and_gives_the_same_digest(
    store: str,
    view: str,
    images: Images,
    network: Network,
    seen: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def options() -> dict[str, Any]:
        augment = label_view(view, Recipe(), 0)
        return {"store": store, "batch_size": 4, "augment": augment, "force": True}

    network.eval()
    whole, parts = tmp_path / "whole.h5", tmp_path / "parts.h5"
    embedded(images, network, whole, **options())
    assert seen == [4, 4, 4, 1]
    for _ in range(3):
        stopped(images, network, parts, monkeypatch, **options())
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "parts.h5.unfinished",
            "whole.h5",
        ]
    seen.clear()
    embedded(images, network, parts, **options())
    assert seen == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.h5", "whole.h5"]
    digests = {envelope.read_header(str(path)).digest for path in (whole, parts)}
    assert len(digests) == 1


def test_rows_of_another_network_or_batch_are_not_taken_up(
    images: Images,
    network: Network,
    seen: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.h5"
    stopped(images, network, path, monkeypatch, batch_size=4)
    seen.clear()
    stopped(images, network, path, monkeypatch, batch_size=5)
    with torch.no_grad():
        network.heads[0].bias.add_(1)
    arrays = embedded(images, network, path, batch_size=5)
    assert seen == [5, 5, 5, 3]
    np.testing.assert_allclose(arrays["logits/0"], direct(network, images)[0], rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_part_is_named(
    images: Images, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(images, network, tmp_path / "a.h5", monkeypatch, batch_size=4)
    part = tmp_path / "a.h5.unfinished"
    part.write_bytes(part.read_bytes()[:2000])
    with pytest.raises(BadData, match=r"a\.h5\.unfinished"):
        embedded(images, network, tmp_path / "a.h5", batch_size=4)


def test_part_of_what_goes_to_a_pipe_is_not_left(
    images: Images, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly):
        embed_stage(images, network, "-", Provenance("test", {}), batch_size=4)
    assert not list(tmp_path.iterdir())
