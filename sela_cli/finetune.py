"""Fine-tuning on PASCAL VOC 2007: images + checkpoint -> average precisions.

n images of a batch, C classes. BatchNorm keeps its statistics throughout: batches here
are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sela_cli import extras, formats, interrupt, outputs, passes, voc
from sela_cli.envelope import Provenance
from sela_cli.errors import SelaError, StoppedEarly, UsageError
from sela_cli.formats import Checkpoint
from sela_cli.images.augment import AUGMENTATIONS, MEAN, STD, random_view
from sela_cli.images.batches import Images, stored_side
from sela_cli.images.sources import Source
from sela_cli.keys import dataset_id
from sela_cli.networks import AlexNet, Network, arrays_of, load_arrays
from sela_cli.progress import Progress, silent
from sela_cli.seeds import generator_of, seed_of
from sela_cli.unfinished import Unfinished, momentum_of, restore_momentum
from sela_cli.voc import CLASSES, Objects

TASKS = ("classification", "detection")
PARTS = ("fc", "all")
# Shares of the iterations at which the rate falls tenfold.
_MILESTONES = (5 / 8, 7 / 8)
_WARM_UP = 100


@dataclass(frozen=True)
class FinetuneRecipe:
    """Settings; what is None has the task's default, see `resolved`.

    `part`: `fc` trains the fully connected layers alone (AlexNet: with fc6 and fc7; a
    detector: all but the convolutions), `all` the whole network. `min_size` is the shorter
    side of an image for detection.
    """

    task: str
    part: str = "all"
    iterations: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 1e-4
    min_size: int = 600
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError where an option has no meaning, MissingExtra without its packages."""
        for option, value, known in (("--task", self.task, TASKS), ("--train", self.part, PARTS)):
            if value not in known:
                raise UsageError(f"{option} {value} is none of {', '.join(known)}")
        if self.lr is not None and not self.lr > 0:
            raise UsageError("--lr must be positive")
        if self.task == "detection":
            extras.require("voc")

    def resolved(self) -> tuple[int, int, float]:
        """Iterations, images a batch, learning rate."""
        batch_size, lr = (16, 0.003) if self.task == "classification" else (4, 0.005)
        return self.iterations or 20_000, self.batch_size or batch_size, self.lr or lr


def finetune_stage(
    train: tuple[Source, list[Objects]],
    test: tuple[Source, list[Objects]],
    network: Network,
    output: str,
    recipe: FinetuneRecipe,
    provenance: Provenance,
    *,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train on `train`, measure on `test`, write a finetune file; one row a class.

    A signal saves the state beside `output` and raises StoppedEarly; the same call then
    goes on from there.
    """
    outputs.check_output(output, force)
    recipe.check()
    identity = {
        "parameters": provenance.parameters,
        "inputs": [entry["digest"] for entry in provenance.inputs],
        "images": [dataset_id(source.keys) for source, _ in (train, test)],
        "recipe": asdict(recipe),
        "device": device.split(":")[0],
    }
    unfinished = Unfinished(output, "finetune", identity, force)
    with torch.random.fork_rng(devices=[]):
        # Fresh layers draw from here.
        torch.manual_seed(recipe.seed)
        task = _classification if recipe.task == "classification" else _detection
        rows = task(train, test, network, recipe, device, progress, unfinished)
    formats.write_precisions(output, recipe.task, rows, provenance, force)
    unfinished.remove()
    return rows


class _Training:
    """SGD of a model on random batches; a state to go on from."""

    def __init__(self, model: nn.Module, network: Network, recipe: FinetuneRecipe) -> None:
        self.model, self.network, self.recipe = model, network, recipe
        self.iterations, self.batch_size, self.lr = recipe.resolved()
        self.step = 0
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=self.lr,
            momentum=0.9,
            weight_decay=recipe.weight_decay,
        )

    def run(
        self,
        loss_of: Callable[[int, np.ndarray], Tensor],
        count: int,
        progress: Progress,
        unfinished: Unfinished,
    ) -> None:
        """To the end, `loss_of` the number of the step and of rows below `count`."""
        left = unfinished.read()
        if left:
            load_arrays(self.model, left.model, f"{unfinished.path}: does not fit this model")
            restore_momentum(self.model, self.optimizer, left.optimizer, str(unfinished.path))
            self.step = left.step
        warm_up = min(_WARM_UP, self.iterations // 10)
        drops = [round(self.iterations * part) for part in _MILESTONES]
        batch_size = min(self.batch_size, count)
        while self.step < self.iterations:
            warmth = min(1.0, (self.step + 1) / (warm_up + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warmth * 0.1 ** sum(self.step >= drop for drop in drops)
            epoch, place = divmod(self.step, count // batch_size)
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(count)
            # Dropout and the detector's sampling of boxes draw from the global generator.
            torch.manual_seed(seed_of(self.recipe.seed, "finetune", self.step))
            loss = loss_of(self.step, order[place * batch_size : (place + 1) * batch_size])
            if not math.isfinite(float(loss.detach())):
                raise SelaError(
                    f"the loss is {float(loss)} at step {self.step}", "try a smaller --lr"
                )
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.step += 1
            done, total = self.step * batch_size, self.iterations * batch_size
            progress(done, total, f"loss {float(loss.detach()):.3f}")
            unfinished.after_step(self.step, self.iterations, self.state)

    def state(self) -> Checkpoint:
        """Where `run` is."""
        return Checkpoint(
            model=arrays_of(self.model),
            optimizer=momentum_of(self.model, self.optimizer),
            arch=self.network.arch,
            image_size=self.network.image_size,
            heads=[len(CLASSES)],
            step=self.step,
            epoch=float(self.step),
            recipe=asdict(self.recipe),
        )


# ---- classification -------------------------------------------------------------


def _classification(
    train: tuple[Source, list[Objects]],
    test: tuple[Source, list[Objects]],
    network: Network,
    recipe: FinetuneRecipe,
    device: str,
    progress: Progress,
    unfinished: Unfinished,
) -> list[dict[str, Any]]:
    images, tested = (_squares(source, network, progress) for source, _ in (train, test))
    shown_NC = torch.from_numpy(voc.presence(train[1]))
    model = classifier(network, recipe.part).to(device)

    def loss_of(step: int, rows: np.ndarray) -> Tensor:
        generator = generator_of(recipe.seed, "finetune view", step)
        batch = images.batch(torch.from_numpy(rows)).to(device)
        view = random_view(batch, network.image_size, AUGMENTATIONS["crop-flip"], generator)
        shown_nC = shown_NC[rows].to(device)
        # What only difficult objects show counts neither way.
        return functional.binary_cross_entropy_with_logits(
            model(view), shown_nC.clamp(min=0).float(), weight=(shown_nC >= 0).float()
        )

    training = _Training(model, network, recipe)
    training.run(loss_of, len(images), progress, unfinished)
    with unfinished.kept(training.state):
        scores_NC = classifier_scores(model, tested, network.image_size, device, progress)
    return voc.classification_precision(scores_NC, voc.presence(test[1]))


def _squares(source: Source, network: Network, progress: Progress) -> Images:
    native = min(source.image(0).shape[:2])
    images = Images(source, stored_side(native, network.image_size), np.arange(len(source)))
    images.hold(progress)
    return images


def classifier(network: Network, part: str) -> nn.Module:
    """Trunk and a fresh linear layer of C outputs; only what is to be trained has gradients."""
    head = nn.Linear(network.width, len(CLASSES))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    trunk = network.trunk.eval().requires_grad_(part == "all")
    for module in _fully_connected(trunk):
        module.requires_grad_(True)
        # Dropout is the one layer that training mode changes here.
        module.train()
    return nn.Sequential(trunk, head)


def _fully_connected(trunk: nn.Module) -> list[nn.Module]:
    return [trunk.fc6, trunk.fc7] if isinstance(trunk, AlexNet) else []


@torch.no_grad()
def classifier_scores(
    model: nn.Module,
    images: Images,
    size: int,
    device: str,
    progress: Progress = silent,
) -> np.ndarray:
    """Mean logits (N, C) of ten crops."""
    model.eval()
    done = 0
    batches = passes.over_ten_crops(images, size, model, [len(CLASSES)], 16, device)
    found: list[Tensor] = []
    for (scores_nC,) in batches:
        found.append(scores_nC)
        done += len(scores_nC)
        progress(done, len(images), "test images")
        if interrupt.requested():
            raise StoppedEarly(f"stopped after {len(found)} batches of test images", "run it again")
    return torch.cat(found).numpy()


# ---- detection ------------------------------------------------------------------


def _detection(
    train: tuple[Source, list[Objects]],
    test: tuple[Source, list[Objects]],
    network: Network,
    recipe: FinetuneRecipe,
    device: str,
    progress: Progress,
    unfinished: Unfinished,
) -> list[dict[str, Any]]:
    source, objects = train
    model = detector(network, recipe.part, recipe.min_size).to(device)
    model.train()

    def loss_of(step: int, rows: np.ndarray) -> Tensor:
        rng = np.random.default_rng([recipe.seed, 1, step])
        pairs = [_example(source, objects, int(row), rng.random() < 0.5) for row in rows]
        images = [image.to(device) for image, _ in pairs]
        targets = [{name: item.to(device) for name, item in each.items()} for _, each in pairs]
        return torch.stack(list(model(images, targets).values())).sum()

    training = _Training(model, network, recipe)
    training.run(loss_of, len(source), progress, unfinished)
    with unfinished.kept(training.state):
        found = detections(model, test[0], device, progress)
    return voc.detection_precision(found, test[1])


def _pixels(source: Source, row: int) -> Tensor:
    return torch.from_numpy(source.image(row).copy()).permute(2, 0, 1).float() / 255


def _example(
    source: Source, objects: Sequence[Objects], row: int, mirrored: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and its boxes for torchvision's detectors; difficult ones are left out."""
    image, kept = _pixels(source, row), ~objects[row].difficult_n
    boxes = torch.from_numpy(objects[row].boxes_n4[kept])
    if mirrored:
        image = image.flip(2)
        boxes = torch.stack(
            [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]],
            1,
        )
    labels = torch.from_numpy(objects[row].classes_n[kept] + 1)
    return image, {"boxes": boxes, "labels": labels}


@torch.no_grad()
def detections(
    model: nn.Module,
    source: Source,
    device: str,
    progress: Progress = silent,
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels that the detector finds in every image."""
    model.eval()
    found = []
    for row in range(len(source)):
        (result,) = model([_pixels(source, row).to(device)])
        found.append({name: item.cpu() for name, item in result.items()})
        progress(row + 1, len(source), "test images")
        if interrupt.requested():
            raise StoppedEarly(f"stopped after {row + 1} test images", "run it again")
    return found


def detector(network: Network, part: str, min_size: int) -> nn.Module:
    """torchvision's Faster R-CNN on the trunk; only what is to be trained has gradients.

    AlexNet: one map, conv5, and fc6 and fc7 on each box, as in Fast R-CNN. ResNets: a
    feature pyramid over the four layers.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    trunk = network.trunk.requires_grad_(part == "all")
    _freeze_batchnorm(trunk)
    sizes = {"min_size": min_size, "max_size": round(min_size * 5 / 3)}
    common: dict[str, Any] = {**sizes, "image_mean": MEAN, "image_std": STD}
    if not isinstance(trunk, AlexNet):
        layers = list(network.layers())
        widths = [_output_channels(network, name) for name in layers]
        names = {name: str(number) for number, name in enumerate(layers)}
        pyramid = BackboneWithFPN(trunk, names, widths, 256)
        return FasterRCNN(pyramid, len(CLASSES) + 1, **common)
    convolutions = nn.Sequential(
        *(trunk.conv1, trunk.pool1, trunk.conv2, trunk.pool2),
        *(trunk.conv3, trunk.conv4, trunk.conv5),
    )
    convolutions.out_channels = _output_channels(network, "conv5")  # type: ignore[assignment]
    side = trunk.pool5.output_size
    assert isinstance(side, int)
    scales = (min_size / 16, min_size / 8, min_size / 4, min_size / 2, float(min_size))
    head = nn.Sequential(nn.Flatten(), trunk.fc6, trunk.fc7).requires_grad_(True)
    return FasterRCNN(
        convolutions,
        rpn_anchor_generator=AnchorGenerator((scales,), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], side, 2),
        box_head=head,
        box_predictor=FastRCNNPredictor(network.width, len(CLASSES) + 1),
        **common,
    )


def _output_channels(network: Network, layer: str) -> int:
    found: list[int] = []
    module = network.layers()[layer]
    hook = module.register_forward_hook(lambda _, inputs, maps: found.append(maps.shape[1]))
    device = next(network.parameters()).device
    with torch.no_grad():
        network.eval().trunk(torch.zeros(1, 3, network.image_size, network.image_size).to(device))
    hook.remove()
    return found[0]


def _freeze_batchnorm(module: nn.Module) -> None:
    """Each BatchNorm2d below becomes torchvision's frozen one, of the same numbers."""
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen)
        else:
            _freeze_batchnorm(child)
