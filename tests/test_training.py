"""Training: exact repetition and going on, losses by hand, schedules by closed form."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss, normalized_mutual_info_score
from torch import Tensor

from sela_cli import envelope, formats, interrupt, networks, training
from sela_cli.commands.run import run
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, SelaError, StoppedEarly, UsageError
from sela_cli.formats import Checkpoint, HeadLabels, Labels
from sela_cli.fresh import fit_heads, make_ready, settle
from sela_cli.images.augment import AUGMENTATIONS, drawn_view, random_view
from sela_cli.images.batches import Images, open_images
from sela_cli.logits import forward
from sela_cli.networks import Network, build, parse_heads
from sela_cli.options import PresetChoice
from sela_cli.presets import PRESETS, preset
from sela_cli.recipe import HEAD_INITS, Recipe
from sela_cli.schedule import learning_rate, relabel_positions, step_at
from sela_cli.training import (
    Trainer,
    Training,
    label_view,
    mean_loss,
    network_of,
    train_stage,
)

HEADS = [10, 4]
RECIPE = Recipe(epochs=2, batch_size=10, aug="paper", lr=0.01)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few filters: these tests are about the training, not the network."""
    monkeypatch.setitem(networks._FILTERS, "alexnet-small", (8, 12, 12, 12, 8))


@pytest.fixture(scope="module")
def images() -> Images:
    return open_images("digits", 32, limit=40)[0]


def fresh(rotation: bool = False) -> Network:
    return build("alexnet-small", 32, HEADS, seed=3, rotation=rotation)


def random_labels(count: int, heads: list[int] = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(clusters, (count,), generator=generator) for clusters in heads]


@pytest.fixture
def labels(images: Images, tmp_path: Path) -> Labels:
    attributes = dict.fromkeys(formats.LABEL_ATTRIBUTES, 0)
    heads = [
        HeadLabels(labels_N.numpy(), np.zeros(clusters), attributes)
        for labels_N, clusters in zip(random_labels(len(images)), HEADS, strict=True)
    ]
    path = str(tmp_path / "labels.h5")
    provenance = Provenance("test", {}, dataset_id=images.dataset_id)
    formats.write_labels(path, Labels(images.keys, images.index_N, heads), provenance)
    return formats.read_labels(path)


def trained(
    images: Images, steps: int, recipe: Recipe = RECIPE, after: Callable[[], None] = lambda: None
) -> Trainer:
    trainer = Trainer(fresh(recipe.rotation), recipe)
    trainer.run(images, random_labels(len(images)), steps, after)
    return trainer


def assert_same_state(one: Trainer, two: Trainer) -> None:
    assert one.step == two.step and one.losses == two.losses
    for left, right in (
        (one.network.arrays(), two.network.arrays()),
        (one.checkpoint(40).optimizer, two.checkpoint(40).optimizer),
    ):
        assert left and left.keys() == right.keys()
        assert all(np.array_equal(left[name], right[name]) for name in left)


# ---- repetition -------------------------------------------------------------


@pytest.mark.parametrize("rotation", [False, True])
def test_training_repeats_bit_for_bit(rotation: bool, images: Images) -> None:
    recipe = Recipe(epochs=2, batch_size=10, aug="paper", lr=0.01, rotation=rotation)
    first = trained(images, 4, recipe)
    torch.manual_seed(99)
    assert_same_state(first, trained(images, 4, recipe))


def test_another_seed_is_another_training(images: Images) -> None:
    other = Recipe(epochs=2, batch_size=10, aug="paper", lr=0.01, seed=1)
    assert trained(images, 2).losses != trained(images, 2, other).losses


@pytest.mark.parametrize("split", [2, 3, 4])
def test_going_on_from_a_file_is_as_if_never_stopped(
    split: int, images: Images, tmp_path: Path
) -> None:
    """Also in the middle of an epoch, which has four steps."""
    half = trained(images, split)
    path = str(tmp_path / "half.h5")
    formats.write_checkpoint(path, half.checkpoint(len(images)), Provenance("test", {}))
    stored = formats.read_checkpoint(path)
    rest = Trainer(network_of(stored, path), RECIPE)
    rest.restore(stored, path)
    rest.run(images, random_labels(len(images)), 6, lambda: None)
    assert_same_state(rest, trained(images, 6))


def test_a_processor_that_runs_ahead_takes_down_every_loss(
    images: Images, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's losses come a step late: in the middle, where it is saved, and at the end."""
    plain = trained(images, 6)
    train_stage(images, labels, fresh(), str(tmp_path / "plain.h5"), RECIPE, to=0.5)
    monkeypatch.setattr(training, "runs_ahead", lambda device: True)
    known: list[int] = []
    late = Trainer(fresh(), RECIPE)
    late.run(images, random_labels(40), 4, lambda: known.append(late.step - len(late.losses)))
    assert known == [1] * 4 and len(late.losses) == 4
    late.run(images, random_labels(40), 6, lambda: late.checkpoint(40))
    assert_same_state(late, plain)
    train_stage(images, labels, fresh(), str(tmp_path / "late.h5"), RECIPE, to=0.5)
    one, other = (envelope.read_header(str(tmp_path / f"{name}.h5")) for name in ("plain", "late"))
    assert one.digest == other.digest


def test_stages_in_two_parts_give_the_digest_of_one(
    images: Images, labels: Labels, tmp_path: Path
) -> None:
    one, half, two = (str(tmp_path / name) for name in ("one.h5", "half.h5", "two.h5"))
    train_stage(images, labels, fresh(), one, RECIPE, to=1.0)
    train_stage(images, labels, fresh(), half, RECIPE, to=0.5)
    start = formats.read_checkpoint(half)
    train_stage(images, labels, network_of(start, half), two, RECIPE, start=start, to=1.0)
    assert envelope.read_header(one).digest == envelope.read_header(two).digest
    done = formats.read_checkpoint(two)
    assert (done.step, done.epoch, len(done.losses)) == (4, 1.0, 4)
    assert done.arch == "alexnet-small" and done.heads == HEADS and done.image_size == 32
    assert labels.header is not None and done.labels_digest == labels.header.digest


@pytest.mark.parametrize("batch_size", [20, 5])
def test_another_batch_size_goes_on_at_the_epoch_of_the_checkpoint(
    batch_size: int, images: Images, labels: Labels, tmp_path: Path
) -> None:
    """Half an epoch is done, and half an epoch of batches of the new size follows."""
    half, whole = str(tmp_path / "half.h5"), str(tmp_path / "whole.h5")
    train_stage(images, labels, fresh(), half, RECIPE, to=0.5)
    start, recipe = formats.read_checkpoint(half), replace(RECIPE, batch_size=batch_size)
    network = network_of(start, half)
    asked = Training("train", images, labels, network, whole, recipe, start, 1.0, False)
    steps: list[int] = []
    done = asked.run("cpu", lambda done, total, note: steps.append(done))
    assert len(steps) == 20 // batch_size and steps[-1] == 20
    assert (done.step, done.epoch, len(done.losses)) == (40 // batch_size, 1.0, 2 + len(steps))
    assert (asked.plan()["from_step"], asked.plan()["to_step"]) == (len(steps), 2 * len(steps))


def test_interrupted_stage_saves_and_goes_on(
    images: Images, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = (str(tmp_path / name) for name in ("whole.h5", "parted.h5"))
    train_stage(images, labels, fresh(), whole, RECIPE, to=1.0)
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly, match="step 1 of 4"):
        train_stage(images, labels, fresh(), parted, RECIPE, to=1.0)
    assert not Path(parted).exists() and Path(f"{parted}.unfinished").exists()
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    steps = []
    progress = lambda done, total, note: steps.append(done)  # noqa: E731
    train_stage(images, labels, fresh(), parted, RECIPE, to=1.0, progress=progress)
    assert len(steps) == 3
    assert envelope.read_header(whole).digest == envelope.read_header(parted).digest
    assert not Path(f"{parted}.unfinished").exists()


def test_stopped_on_its_way_to_standard_output_it_claims_to_have_saved_nothing(
    images: Images, labels: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly, match=r"step 1 of 4, nothing saved; .*-o FILE"):
        train_stage(images, labels, fresh(), "-", RECIPE, to=1.0)


def test_saved_state_of_another_recipe_is_not_taken_up(
    images: Images, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = (str(tmp_path / name) for name in ("whole.h5", "parted.h5"))
    other = Recipe(epochs=2, batch_size=10, aug="paper", lr=0.02)
    train_stage(images, labels, fresh(), whole, other, to=0.5)
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly):
        train_stage(images, labels, fresh(), parted, RECIPE, to=0.5)
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    with pytest.raises(CannotCreate, match="differs in lr"):
        train_stage(images, labels, fresh(), parted, other, to=0.5)
    train_stage(images, labels, fresh(), parted, other, to=0.5, force=True)
    assert envelope.read_header(whole).digest == envelope.read_header(parted).digest


@pytest.mark.parametrize(
    "other", [{"image_size": 48}, {"arch": "resnet18"}, {"device": "cuda:0"}], ids=str
)
def test_saved_state_of_another_network_or_device_is_not_taken_up(
    other: dict[str, Any],
    images: Images,
    labels: Labels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Everything is computed on the CPU, whatever the stage is told.
    monkeypatch.setattr(training, "Trainer", lambda *stage: Trainer(*stage[:2]))
    monkeypatch.setattr(training, "make_ready", lambda *stage: make_ready(*stage[:3]))

    def train(
        arch: str = "alexnet-small", image_size: int = 32, device: str = "cpu", force: bool = False
    ) -> int:
        steps: list[int] = []
        train_stage(
            *(images, labels, build(arch, image_size, HEADS, seed=3), str(tmp_path / "a.h5")),
            RECIPE,
            to=0.5,
            device=device,
            force=force,
            progress=lambda done, total, note: steps.append(done),
        )
        return len(steps)

    with monkeypatch.context() as patch, pytest.raises(StoppedEarly):
        patch.setattr(interrupt, "requested", lambda: True)
        train(**other)
    (name,) = other
    with pytest.raises(CannotCreate, match=f"differs in {name.replace('_', '-')};"):
        train()
    assert train(force=True) == 2


def test_a_checkpoint_that_does_not_fit_is_refused(images: Images) -> None:
    good = trained(images, 1).checkpoint(len(images))
    name, momentum = next(iter(good.optimizer.items()))
    for bad in ({name: momentum[:1]}, {"elsewhere": momentum}):
        state = Checkpoint(**{**vars(good), "optimizer": bad})
        with pytest.raises(BadData, match=r"a\.h5.*momentum"):
            Trainer(fresh(), RECIPE).restore(state, "a.h5")


def test_labels_of_other_images_or_heads_are_refused(
    images: Images, labels: Labels, tmp_path: Path
) -> None:
    part = images.subset(np.arange(20))
    with pytest.raises(BadData, match="dataset-id"):
        train_stage(part, labels, fresh(), str(tmp_path / "a.h5"), RECIPE)
    other = build("alexnet-small", 32, [10, 5], seed=0)
    with pytest.raises(BadData, match="heads"):
        train_stage(images, labels, other, str(tmp_path / "a.h5"), RECIPE)
    assert not (tmp_path / "a.h5").exists()


def test_training_backwards_is_refused(images: Images, labels: Labels, tmp_path: Path) -> None:
    half = str(tmp_path / "half.h5")
    train_stage(images, labels, fresh(), half, RECIPE, to=0.5)
    start = formats.read_checkpoint(half)
    for to, recipe in ((0.25, RECIPE), (None, replace(RECIPE, epochs=0.25))):
        option = "--epochs" if to is None else "--to"
        with pytest.raises(UsageError, match=rf"^{option} 0\.25 .* epoch 0\.5,"):
            train_stage(images, labels, fresh(), str(tmp_path / "a.h5"), recipe, start=start, to=to)


def test_stopped_training_is_not_gone_back_behind(
    images: Images, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no checkpoint was given, but unfinished work lies there."""
    output = str(tmp_path / "a.h5")
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "requested", lambda: True)
        for step in (1, 2, 3):
            with pytest.raises(StoppedEarly, match=f"step {step} of 4"):
                train_stage(images, labels, fresh(), output, RECIPE, to=1.0)
    with pytest.raises(UsageError, match=r"^--to 0\.3 .* epoch 0\.75,"):
        train_stage(images, labels, fresh(), output, RECIPE, to=0.3)


# ---- the loss ---------------------------------------------------------------


class Spy:
    """What a network's trunk saw and gave, step by step, and the heads' weights at that time."""

    def __init__(self, network: Network) -> None:
        self.views: list[Tensor] = []
        self.features: list[np.ndarray] = []
        self.heads: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.network = network
        network.trunk.register_forward_hook(self.see)

    def see(self, module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.views.append(inputs[0].detach().clone())
        self.features.append(output.detach().double().numpy().copy())
        heads = [*self.network.heads, *filter(None, [self.network.rotation])]
        self.heads.append(
            [(h.weight.detach().numpy().copy(), h.bias.detach().numpy().copy()) for h in heads]
        )


def cross_entropy(
    features: np.ndarray, head: tuple[np.ndarray, np.ndarray], truth: Tensor
) -> float:
    weight_KD, bias_K = head
    logits = features @ weight_KD.T.astype(float) + bias_K
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = odds / odds.sum(axis=1, keepdims=True)
    return float(log_loss(truth.numpy(), p, labels=np.arange(len(bias_K))))


def watch_rows(images: Images, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    rows: list[Tensor] = []
    original = images.batch
    monkeypatch.setattr(images, "batch", lambda rows_n: rows.append(rows_n) or original(rows_n))
    return rows


@pytest.mark.parametrize("rotation", [False, True])
def test_loss_is_the_mean_over_heads(
    rotation: bool, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with rotation, plus the four-way loss of the turned views."""
    rows = watch_rows(images, monkeypatch)
    network, labels_TN = fresh(rotation), random_labels(len(images))
    spy = Spy(network)
    trainer = Trainer(network, Recipe(epochs=2, batch_size=10, rotation=rotation, lr=0.1))
    trainer.run(images, labels_TN, 3, lambda: None)
    for step, loss in enumerate(trainer.losses):
        features, heads = spy.features[step], spy.heads[step]
        each = [
            cross_entropy(features[:10], head, labels_N[rows[step]])
            for head, labels_N in zip(heads, labels_TN, strict=False)
        ]
        expected = float(np.mean(each))
        if rotation:
            turns = torch.tensor([0, 1, 2, 3]).repeat_interleave(10)
            expected += cross_entropy(features, heads[-1], turns)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clusters", [[4], [4, 4, 4], [3, 5, 1]])
def test_the_loss_of_several_heads_is_their_mean(clusters: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, k, generator=generator, dtype=torch.float64) for k in clusters]
    labels = [torch.randint(0, k, (6,), generator=generator) for k in clusters]
    losses = [
        -np.log(softmax(x.numpy(), axis=1)[range(6), y])
        for x, y in zip(logits, labels, strict=True)
    ]
    found = mean_loss(torch.cat(logits, 1), torch.stack(labels), clusters)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-12)


def test_turned_views_are_exact(images: Images) -> None:
    network = fresh(rotation=True)
    spy = Spy(network)
    recipe = Recipe(epochs=2, batch_size=10, rotation=True)
    Trainer(network, recipe).run(images, random_labels(40), 1, lambda: None)
    view = spy.views[0].numpy()
    assert len(view) == 40
    for turns in range(4):
        expected = np.rot90(view[:10], turns, axes=(2, 3))
        np.testing.assert_array_equal(view[10 * turns : 10 * (turns + 1)], expected)


@pytest.mark.parametrize(("batch_size", "steps"), [(10, 4), (8, 5), (12, 3), (40, 1), (100, 1)])
def test_an_epoch_sees_every_image_at_most_once(
    batch_size: int, steps: int, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every one of them, where the batch size divides their number."""
    rows = watch_rows(images, monkeypatch)
    recipe = Recipe(epochs=2, batch_size=batch_size, lr=0.01)
    assert recipe.steps_per_epoch(40) == steps
    trained(images, 2 * steps, recipe)
    first, second = (torch.cat(part).tolist() for part in (rows[:steps], rows[steps:]))
    used = min(batch_size, 40) * steps
    for epoch in (first, second):
        assert len(epoch) == used == len(set(epoch)) and set(epoch) <= set(range(40))
    assert first != second


def test_momentum_and_weight_decay_are_sgds(images: Images) -> None:
    """The head's bias by hand: v <- m v + g + w b, b <- b - lr v."""
    network = fresh()
    recipe = Recipe(
        epochs=2, batch_size=10, lr=0.05, momentum=0.7, weight_decay=0.01, lr_schedule="cosine"
    )
    trainer = Trainer(network, recipe)
    bias, velocity = network.heads[0].bias, torch.zeros(10)
    expected = bias.detach().clone()
    for step in range(3):
        trainer.run(images, random_labels(40), step + 1, lambda: None)
        velocity = 0.7 * velocity + bias.grad + 0.01 * expected
        expected = expected - recipe.lr_at(step, 40) * velocity
        torch.testing.assert_close(bias.detach(), expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_is_close_but_not_equal(images: Images) -> None:
    losses = [
        trained(images, 3, Recipe(epochs=2, batch_size=10, lr=0.01, precision=name)).losses
        for name in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loss_that_is_not_finite_is_an_error(images: Images) -> None:
    with pytest.raises(SelaError, match="--lr") as caught:
        trained(images, 8, Recipe(epochs=2, batch_size=10, lr=1e30))
    assert caught.value.exit_code == 1


def test_true_labels_are_learned() -> None:
    images, _ = open_images("digits", 32, limit=60)
    assert images.truth_N is not None
    network = build("alexnet-small", 32, [10], seed=0)
    recipe = Recipe(epochs=60, batch_size=20, lr=0.03, aug="none", lr_schedule="constant")
    trainer = Trainer(network, recipe)
    trainer.run(images, [torch.from_numpy(images.truth_N)], 150, lambda: None)
    assert np.mean(trainer.losses[-6:]) < 0.5 * math.log(10)
    assert trainer.losses[0] == pytest.approx(math.log(10), rel=0.1)


# ---- schedules --------------------------------------------------------------


def test_lr_step_falls_at_fractions_of_the_epochs() -> None:
    recipe = Recipe(epochs=8, batch_size=10, lr=0.5, lr_milestones=(0.25, 0.5), lr_factor=0.1)
    rates = [recipe.lr_at(step, 40) for step in range(32)]
    # 0.28 times 100 is more than 28 in floating point.
    long = replace(recipe, epochs=100, lr_milestones=(0.28,))
    assert [long.lr_at(step, 40) for step in (111, 112)] == [0.5, pytest.approx(0.05)]
    np.testing.assert_allclose(rates, [0.5] * 8 + [0.05] * 8 + [0.005] * 16)


def test_lr_cosine_and_constant() -> None:
    steps = np.arange(32)
    for kind, expected in (
        ("cosine", 0.25 * (1 + np.cos(np.pi * steps / 32))),
        ("constant", np.full(32, 0.5)),
    ):
        recipe = Recipe(epochs=8, batch_size=10, lr=0.5, lr_schedule=kind)
        np.testing.assert_allclose([recipe.lr_at(step, 40) for step in steps], expected)
    assert learning_rate(9, 8, 0.5, "cosine", [], 0.1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize(("epochs", "opts"), [(400, 100), (400, 400), (30, 15), (7.5, 3)])
def test_relabel_positions(kind: str, epochs: float, opts: int) -> None:
    power = {"quadratic": 2, "linear": 1}[kind]
    shares = np.arange(opts) / (opts - 1)
    expected = (epochs + 1.01) * shares**power
    positions = relabel_positions(epochs, opts, kind)
    np.testing.assert_allclose(positions, expected[expected < epochs])
    assert positions[0] == 0 and len(positions) < opts


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize(("opts", "positions"), [(0, []), (1, [0]), (2, [0])])
def test_few_relabellings(opts: int, positions: list[float], kind: str) -> None:
    assert relabel_positions(10, opts, kind) == positions


@pytest.mark.parametrize("per_epoch", [1, 7, 195, 5004])
def test_step_at_is_the_first_at_or_after(per_epoch: int) -> None:
    for step in range(0, 40 * per_epoch, max(1, per_epoch // 3)):
        assert step_at(step / per_epoch, per_epoch) == step
        assert step_at((step + 0.5) / per_epoch, per_epoch) == step + 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"aug": "mirror"},
        {"precision": "float8"},
        {"lr_schedule": "warm"},
        {"lr": 0.0},
        {"epochs": -1.0},
        {"batch_size": 0},
    ],
)
def test_recipes_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        Recipe.of(wrong).check()


def test_recipe_layers_override() -> None:
    recipe = Recipe.of({"lr": 1.0, "seed": 4, "foreign": 1}, {"lr": 2.0, "seed": None})
    assert (recipe.lr, recipe.seed) == (2.0, 4)


# ---- presets ----------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_of_run(name: str) -> None:
    settings = preset(name)
    assert set(settings) <= set(inspect.signature(run).parameters)
    Recipe.of(settings).check()
    assert settings["aug"] in AUGMENTATIONS and settings["arch"] in networks.ARCHS
    assert parse_heads(settings["heads"])
    assert relabel_positions(settings["epochs"], settings["opts"], settings["relabel"])


def test_preset_names() -> None:
    assert set(get_args(PresetChoice)) == set(PRESETS)
    assert preset(None) == {}
    preset("digits")["lr"] = 9.0
    assert preset("digits")["lr"] != 9.0


# ---- a fresh network, and views for labels -----------------------------------


def test_settling_makes_eval_mode_normalise(images: Images) -> None:
    """After it, the first BatchNorm's output has mean 0 and variance 1 over training views."""
    network = fresh()
    settle(network, images, RECIPE)
    conv, norm = network.trunk.conv1[0], network.trunk.conv1[1]  # type: ignore[index, union-attr]
    generator = torch.Generator().manual_seed(0)
    view = torch.cat(
        [
            random_view(images.batch(torch.arange(40)), 32, AUGMENTATIONS["paper"], generator)
            for _ in range(10)
        ]
    )
    with torch.no_grad():
        normed = norm(conv(view))
    assert not norm.training and norm.momentum == 0.1
    assert float(normed.mean().abs()) < 0.1 and abs(float(normed.var()) - 1) < 0.15


def test_settling_repeats_and_moves_no_weight(images: Images) -> None:
    before = fresh().arrays()
    networks_ = [fresh() for _ in range(2)]
    for network in networks_:
        settle(network, images, RECIPE)
    one, two = (network.arrays() for network in networks_)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    moved = {name for name in one if not np.array_equal(one[name], before[name])}
    assert moved and all("running" in name or "tracked" in name for name in moved)


def test_heads_by_kmeans_tell_more_of_the_digits_than_random_ones() -> None:
    digits, _ = open_images("digits", 32, limit=600)
    found = {}
    for kind in HEAD_INITS:
        network = build("alexnet-small", 32, [10, 20], seed=3)
        make_ready(network, digits, replace(RECIPE, head_init=kind))
        logits = forward(network, digits, 200, features=False)
        found[kind] = [
            normalized_mutual_info_score(digits.truth_N, head_nK.argmax(1))
            for head_nK in (torch.cat(blocks) for blocks in zip(*logits, strict=True))
        ]
    for random, kmeans in zip(found["random"], found["kmeans"], strict=True):
        assert kmeans > 0.3 > random


def test_heads_by_kmeans_repeat_and_leave_the_trunk_alone(images: Images) -> None:
    one, two, plain = (fresh() for _ in range(3))
    for network in (one, two):
        make_ready(network, images, replace(RECIPE, head_init="kmeans"))
    settle(plain, images, RECIPE)
    for name, array in one.arrays().items():
        assert np.array_equal(array, two.arrays()[name])
        assert np.array_equal(array, plain.arrays()[name]) != name.startswith("heads")


def test_heads_by_kmeans_of_some_of_the_images(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sela_cli.fresh._FITTED", (2, 12))
    network, expected = fresh(), fresh()
    fit_heads(network, images, seed=0)
    # Twice as many as the wider head has clusters, both ends among them.
    fit_heads(expected, images.subset(np.linspace(0, 39, 20).round().astype(int)), seed=0)
    for name, array in network.arrays().items():
        assert np.array_equal(array, expected.arrays()[name])


def test_heads_that_can_not_be_fitted(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="41 clusters of 40 images"):
        fit_heads(build("alexnet-small", 32, [41], seed=3), images, seed=0)
    network = fresh()
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(StoppedEarly, match="run it again"):
        fit_heads(network, images, seed=0)
    network.trunk.conv1[0].weight.data.fill_(torch.nan)  # type: ignore[index, union-attr, operator]
    with pytest.raises(BadData, match="not finite"):
        fit_heads(network, images, seed=0)


def test_a_network_is_made_ready_once(
    images: Images, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever calls, or by training; not where there is a state to go on from."""
    calls: list[Network] = []

    def counted(network: Network, *rest: Any) -> None:
        calls.append(network)
        make_ready(network, *rest)

    monkeypatch.setattr(training, "make_ready", counted)
    recipe = replace(RECIPE, head_init="kmeans")
    network = fresh()
    make_ready(network, images, recipe)
    one, two = (
        train_stage(images, labels, network, str(tmp_path / f"{ready}.h5"), recipe, ready=ready)
        for network, ready in ((network, True), (fresh(), False))
    )
    assert len(calls) == 1
    assert all(np.array_equal(one.model[name], two.model[name]) for name in one.model)
    path = str(tmp_path / "stopped.h5")
    monkeypatch.setattr(interrupt, "requested", lambda: len(calls) == 2)
    with pytest.raises(StoppedEarly):
        train_stage(images, labels, fresh(), path, RECIPE)
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    train_stage(images, labels, fresh(), path, RECIPE)
    assert len(calls) == 2


def test_label_views_are_those_of_training_and_follow_the_step(images: Images) -> None:
    batch = images.batch(torch.arange(6))
    assert label_view("centre", RECIPE, 3) is None
    views = []
    for step in (3, 3, 4):
        augment = label_view("random", RECIPE, step)
        assert augment is not None
        views.append(drawn_view(batch, 32, augment(6, 32)))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert views[0].shape == (6, 3, 32, 32)
