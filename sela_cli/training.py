"""Stage 3: images + labels -> checkpoint. Cross-entropy on fixed labels, mean over the heads.

N images, n of a batch, K clusters, T heads, S clusters of all heads. A position is a number
of epochs, a step one batch. Every random draw is a function of the seed and of the epoch or
step it is for, so that a checkpoint (weights, momentum, step) is all that is needed to go on
exactly.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from sela_cli import batchwide, formats, job, outputs, parallel
from sela_cli.devices import Graphed, fetched, has_graphs, runs_ahead, sent
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, SelaError, UsageError
from sela_cli.formats import Checkpoint, Labels
from sela_cli.fresh import make_ready
from sela_cli.images.augment import AUGMENTATIONS, DrawOf, draw
from sela_cli.images.batches import Images, open_images
from sela_cli.networks import Network, build, check_arch, unfilled
from sela_cli.passes import at_random, shared_batch
from sela_cli.precision import autocast, decided
from sela_cli.progress import Progress, silent
from sela_cli.recipe import Recipe, check_rates
from sela_cli.seeds import generator_of, seed_of
from sela_cli.unfinished import Unfinished, began_in, momentum_of, restore_momentum


class Objective(nn.Module):
    """What is minimised: the mean of the heads' cross-entropies, plus RotNet's where asked for."""

    def __init__(self, network: Network, device: str, precision: str) -> None:
        super().__init__()
        self.network, self.device, self.precision = network, device, precision

    def forward(self, view: Tensor, labels_Tn: Tensor) -> Tensor:
        """(n, 3, R, R) and (T, n) -> the loss."""
        count, rotation = len(view), self.network.rotation
        if rotation is not None:
            view = torch.cat([view.rot90(turns, (2, 3)) for turns in range(4)])
        with autocast(self.device, self.precision):
            features = self.network.trunk(view.contiguous(memory_format=torch.channels_last))
            logits_nS = self.network.logits(features[:count])
            turned = rotation(features) if rotation is not None else None
        loss = mean_loss(logits_nS.float(), labels_Tn, self.network.clusters)
        if turned is not None:
            turns = torch.arange(4, device=view.device).repeat_interleave(count)
            loss = loss + functional.cross_entropy(turned.float(), turns)
        return loss


def mean_loss(logits_nS: Tensor, labels_Tn: Tensor, clusters: list[int]) -> Tensor:
    """Mean over the heads of their mean cross-entropies; `clusters` says whose logits are whose."""
    count, heads = len(logits_nS), len(clusters)
    if len(set(clusters)) == 1:
        # As one head of T times as many images: a GPU is long at many small operations.
        logits_mK = logits_nS.view(count * heads, -1)
        return functional.cross_entropy(logits_mK, labels_Tn.T.flatten())
    losses = [
        functional.cross_entropy(logits_nK, labels_n)
        for logits_nK, labels_n in zip(torch.split(logits_nS, clusters, 1), labels_Tn, strict=True)
    ]
    return torch.stack(losses).mean()


class Trainer:
    """A network in training: the weights, their momentum, and the step they are at.

    In a job of several processes each has a part of every batch; the steps are those of one.
    """

    def __init__(self, network: Network, recipe: Recipe, device: str = "cpu") -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.recipe, self.device = recipe, device
        self.step = 0
        self.losses: list[float] = []
        self.labels_digest = ""
        # The loss of a step that a GPU may still be at, and the step.
        self._at_work: tuple[int, Callable[[], Tensor]] | None = None
        self._graphed = has_graphs(device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            # A graph reads it where it is; on the CPU a tensor would round it.
            lr=torch.tensor(recipe.lr, device=device) if self._graphed else recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.objective: nn.Module = Objective(self.network, device, recipe.precision)
        if parallel.size() > 1:
            # BatchNorm's statistics are of all processes, and the same in each.
            self.objective = DistributedDataParallel(self.objective, broadcast_buffers=False)
        if recipe.compile:
            if device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
                raise UsageError("--compile needs a C++ compiler on the CPU", "install g++")
            # What is cached is what the processor can do.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            self.objective.compile()

    def run(
        self, images: Images, labels_TN: Sequence[Tensor], to_step: int, after: Callable[[], None]
    ) -> None:
        """Train to `to_step`; `after` is called after every step.

        A GPU goes on with a step while the loss of the one before is taken down.
        """
        recipe, count = self.recipe, len(images)
        batch_size = shared_batch(recipe.batch_size, count)
        mine = job.share(batch_size)
        # DDP takes the mean over the processes, whose parts may differ by an image.
        weight = (mine.stop - mine.start) * parallel.size() / batch_size
        if parallel.size() > 1:
            turns = 4 if recipe.rotation else 1
            rows_n = torch.arange(turns * batch_size).view(turns, -1)[:, mine].flatten()
            batchwide.divide(self.network, rows_n, turns * batch_size)

        def update(view: Tensor, labels_Tn: Tensor) -> Tensor:
            loss: Tensor = weight * self.objective(view, labels_Tn)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            return loss.detach()

        step = Graphed(update) if self._graphed else update
        self.network.train()
        steps = range(self.step, to_step)
        ready = at_random(
            images, self.network.image_size, recipe.aug, recipe.seed, steps, batch_size, self.device
        )
        batch = next(ready, None)
        while batch is not None:
            rows_n, view = batch
            labels_Tn = torch.stack([labels_N[rows_n] for labels_N in labels_TN])
            # Dropout draws from the global generator.
            torch.manual_seed(seed_of(recipe.seed, "dropout", self.step))
            self._set_rate(recipe.lr_at(self.step, count))
            begun = self.step, fetched(step(view, sent(labels_Tn, self.device)).float())
            # Made while a GPU is at work on this step.
            batch = next(ready, None)
            self._take_loss()
            self._at_work = begun
            # Processes add up their losses in step, and only the first of them saves.
            if parallel.size() > 1 or not runs_ahead(self.device):
                self._take_loss()
            self.step += 1
            after()
        self._take_loss()

    def _take_loss(self) -> None:
        """Take down the loss of the step that is at work, if there is one; wait for it."""
        if self._at_work is None:
            return
        (step, loss), self._at_work = self._at_work, None
        part = loss() / parallel.size()
        self.losses.append(float(parallel.sum_of(part)))
        if not math.isfinite(self.losses[-1]):
            raise SelaError(f"the loss is {self.losses[-1]} at step {step}", "try a smaller --lr")

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if self._graphed:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def checkpoint(self, count: int) -> Checkpoint:
        """Everything that is needed to go on, for a collection of `count` images."""
        self._take_loss()
        return Checkpoint(
            model=self.network.arrays(),
            optimizer=momentum_of(self.network, self.optimizer),
            arch=self.network.arch,
            image_size=self.network.image_size,
            heads=self.network.clusters,
            step=self.step,
            epoch=self.step / self.recipe.steps_per_epoch(count),
            recipe=asdict(self.recipe),
            labels_digest=self.labels_digest,
            losses=np.array(self.losses, dtype=np.float32),
        )

    def restore(self, checkpoint: Checkpoint, path: str) -> None:
        """Take up where a checkpoint stands. Raises BadData where it does not fit."""
        self.network.load_arrays(checkpoint.model, path)
        self.step, self.losses = checkpoint.step, checkpoint.losses.tolist()
        restore_momentum(self.network, self.optimizer, checkpoint.optimizer, path)


def label_view(kind: str, recipe: Recipe, step: int) -> DrawOf | None:
    """How images are seen for labelling: `centre` (None), or `random`, as in training.

    Random views keep what training is to forget, such as brightness, from coming back
    through the labels. Drawn from the seed and the step, as everything is.
    """
    if kind == "centre":
        return None
    generator = generator_of(recipe.seed, "label view", step)
    augmentation = AUGMENTATIONS[recipe.aug]
    return partial(draw, augmentation=augmentation, generator=generator)


def check_views(view: str, views: int) -> None:
    """Raises UsageError where several views would all be the same."""
    if views > 1 and view != "random":
        raise UsageError(f"--views {views} is for --view random", "add --view random")


def network_of(checkpoint: Checkpoint, path: str) -> Network:
    """The network of a checkpoint, with its weights."""
    rotation = bool(checkpoint.recipe.get("rotation"))
    network = unfilled(checkpoint.arch, checkpoint.image_size, checkpoint.heads, rotation)
    network.load_arrays(checkpoint.model, path)
    return network


def check_labels(images: Images, labels: Labels, network: Network) -> None:
    """Refuse labels of other images or of another network's heads. Raises BadData."""
    assert labels.header is not None
    path = labels.header.path
    if labels.clusters != network.clusters:
        raise BadData(
            f"{path} has heads {labels.clusters}, the network has {network.clusters}",
            "label the logits of this network, or start a fresh one with `sela retrain`",
        )
    if labels.header.dataset_id != images.dataset_id:
        raise BadData(
            f"{path} labels {len(labels.keys)} images that are not the {len(images)} of "
            f"{images.spec} (dataset-id differs)",
            "embed and label this data first",
        )


def train_stage(
    images: Images,
    labels: Labels,
    network: Network,
    output: str,
    recipe: Recipe,
    *,
    command: str = "train",
    start: Checkpoint | None = None,
    to: float | None = None,
    device: str = "cpu",
    force: bool = False,
    ready: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Train to position `to` (epochs; default: the recipe's end) and write a checkpoint.

    `start`: the checkpoint to go on from, else `network`, which is made ready unless it is
    so already. A signal saves the state beside `output` and raises StoppedEarly; the same
    call then goes on from there.
    """
    recipe.check()
    assert recipe.precision != "auto"
    outputs.check_output(output, force)
    check_labels(images, labels, network)
    assert labels.header is not None
    job.meet()
    provenance = Provenance(command, asdict(recipe) | {"to": to}, dataset_id=images.dataset_id)
    provenance = provenance.reading("labels", labels.header)
    identity = {
        "start": start.header.digest if start and start.header else "",
        "labels": labels.header.digest,
        "recipe": asdict(recipe),
        "arch": network.arch,
        "image_size": network.image_size,
        "device": device.split(":")[0],
    }
    unfinished = Unfinished(output, "train", identity, force)
    left = unfinished.read()
    if left is None and start is None and not ready:
        make_ready(network, images, recipe, device, progress)
    trainer = Trainer(network, recipe, device)
    if start:
        assert start.header is not None
        provenance = provenance.reading("checkpoint", start.header)
        trainer.restore(start, start.header.path)
        # Its own step, unless the batch size or the number of images is another.
        trainer.step = recipe.steps(start.epoch, len(images))
    if left:
        trainer.restore(left, str(unfinished.path))
    trainer.labels_digest = labels.header.digest
    mend = f"rm {unfinished.path} to begin anew" if left else ""
    first, last = trainer.step, _last_step(recipe, to, trainer.step, len(images), mend)
    batch = min(recipe.batch_size, len(images))

    def after() -> None:
        done, total = (trainer.step - first) * batch, (last - first) * batch
        # A GPU may be at the first.
        note = f"loss {trainer.losses[-1]:.3f}" if trainer.losses else ""
        progress(done, total, note)
        unfinished.after_step(trainer.step, last, lambda: trainer.checkpoint(len(images)))

    labels_TN = [torch.from_numpy(head.labels_N.astype(np.int64)) for head in labels.heads]
    trainer.run(images, labels_TN, last, after)
    checkpoint = trainer.checkpoint(len(images))

    def write() -> None:
        formats.write_checkpoint(output, checkpoint, provenance, force)
        unfinished.remove()

    job.once(write)
    return checkpoint


def _last_step(recipe: Recipe, to: float | None, first: int, count: int, mend: str = "") -> int:
    """The one to train to; UsageError where `first`, which is reached, comes after it."""
    option, goal = ("--epochs", recipe.epochs) if to is None else ("--to", to)
    last = recipe.steps(goal, count)
    if last < first:
        reached = first / recipe.steps_per_epoch(count)
        raise UsageError(f"{option} {goal:g} lies before epoch {reached:g}, already reached", mend)
    return last


@dataclass
class Training:
    """A training as the command line asks for it, checked and ready to run."""

    command: str
    images: Images
    labels: Labels
    network: Network
    output: str
    recipe: Recipe
    start: Checkpoint | None
    to: float | None
    force: bool

    def run(self, device: str, progress: Progress) -> Checkpoint:
        """Do it; see `train_stage`."""
        precision = decided(
            self.recipe.precision,
            partial(began_in, self.output),
            self.network,
            self.recipe.views(len(self.images)),
            device,
            training=True,
        )
        return train_stage(
            self.images,
            self.labels,
            self.network,
            self.output,
            replace(self.recipe, precision=precision),
            command=self.command,
            start=self.start,
            to=self.to,
            device=device,
            force=self.force,
            progress=progress,
        )

    def plan(self) -> dict[str, Any]:
        """What a dry run shows. Raises UsageError where the goal is reached already."""
        count = len(self.images)
        first = self.recipe.steps(self.start.epoch, count) if self.start else 0
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        return {
            "output": self.output,
            "images": count,
            "arch": self.network.arch,
            "image_size": self.network.image_size,
            "heads": self.network.clusters,
            "parameters": parameters,
            "megabytes": 8 * parameters / 1e6,
            "from_step": first,
            "to_step": _last_step(self.recipe, self.to, first, count),
            "recipe": asdict(self.recipe),
        }


def prepare(
    command: str,
    data: str,
    labels_path: str,
    output: str,
    options: dict[str, Any],
    *,
    defaults: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    arch: str | None = None,
    image_size: int | None = None,
    to: float | None = None,
    force: bool = False,
    **opening: Any,
) -> Training:
    """Open everything that `sela train` and `sela retrain` name, and check that it fits.

    `options` override the checkpoint's recipe, or a fresh network's `defaults`; `opening`
    goes to `open_images`.
    """
    if (checkpoint is None) == (arch is None):
        raise UsageError("give --checkpoint to go on from, or --arch for a fresh network")
    if to is not None and not 0 <= to < math.inf:
        raise UsageError(f"--to {to} must be at least 0 and finite")
    if checkpoint and image_size is not None:
        raise UsageError("--image-size is the checkpoint's", "leave it out")
    if checkpoint and options.get("head_init"):
        raise UsageError("--head-init is for a fresh network", "leave it out")
    if arch is not None:
        check_arch(arch)
    labels = formats.read_labels(labels_path)
    start = formats.read_checkpoint(checkpoint) if checkpoint else None
    recipe = Recipe.of(start.recipe if start else defaults or {}, options)
    recipe.check()
    check_rates(options, recipe)
    if start and start.epoch >= recipe.epochs and to is None and "epochs" not in options:
        raise UsageError(
            f"{checkpoint} is at the end of its training, epoch {start.epoch:g}",
            "name a larger --epochs",
        )
    if start and recipe.precision == "auto" and "precision" in start.recipe:
        recipe = replace(recipe, precision=start.recipe["precision"])
    images, size = open_images(data, start.image_size if start else image_size, **opening)
    if start and checkpoint:
        network = network_of(start, checkpoint)
    else:
        network = build(str(arch), size, labels.clusters, recipe.seed, recipe.rotation)
    check_labels(images, labels, network)
    return Training(command, images, labels, network, output, recipe, start, to, force)
