"""Stage 4: images + checkpoint -> probe. How good are the features, by true classes.

N images, n of a batch, D features of a layer, C classes. The network is frozen and in
eval mode throughout. Nothing is chosen on the images that are reported on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sela_cli import formats, interrupt, job, parallel, passes
from sela_cli.batchwide import BatchNorm1d
from sela_cli.errors import BadData, StoppedEarly, UsageError
from sela_cli.formats import Provenance
from sela_cli.images.augment import AUGMENTATIONS, draw, drawn_view
from sela_cli.images.batches import SMALL, Images
from sela_cli.logits import forward
from sela_cli.networks import Network
from sela_cli.precision import autocast

METHODS = ("linear", "knn", "both")
Progress = Callable[[int, int, str], None]

# The paper's pooling before the linear classifiers of AlexNet at 224 pixels: (kernel,
# stride, padding), about 9,600 inputs each.
_PAPER_POOLING = {
    "conv1": (6, 6, 3),
    "conv2": (4, 4, 0),
    "conv3": (3, 3, 1),
    "conv4": (3, 3, 1),
    "conv5": (2, 2, 0),
}
_LINEAR_INPUTS = 9600


def holdout(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """A seeded split into bank and test images, for collections without a test set."""
    order = np.random.default_rng(seed).permutation(len(images))
    if len(images) < 2:
        raise BadData(f"{images.spec}: one image can't be split into bank and test", "give --test")
    tested = min(max(1, round(fraction * len(images))), len(images) - 1)
    return images.subset(np.sort(order[tested:])), images.subset(np.sort(order[:tested]))


def probe_stage(
    train: Images,
    test: Images,
    network: Network,
    output: str,
    provenance: Provenance,
    *,
    method: str = "both",
    layers: str = "all",
    ks: Sequence[int] = (10,),
    sigmas: Sequence[float] = (0.1,),
    epochs: int = 36,
    lr: float = 0.01,
    batch_size: int = 192,
    aug: str = "crop-flip",
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    split: str = "test",
    force: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> list[dict[str, Any]]:
    """Measure kNN and linear accuracy on `test` and write a probe file. Both need `truth`."""
    formats.check_output(output, force)
    job.meet()
    for option, value, known in (
        ("--method", method, METHODS),
        ("--aug", aug, tuple(AUGMENTATIONS)),
    ):
        if value not in known:
            raise UsageError(f"{option} {value} is none of {', '.join(known)}")
    if not ks or min(ks) < 1 or not sigmas or not min(sigmas) > 0 or not lr > 0:
        raise UsageError("--k must be at least 1, --sigma and --lr positive")
    names = _chosen(network, layers)
    for images in (train, test):
        if images.truth_N is None:
            raise BadData(
                f"{images.spec} has no true classes, and probes measure by them",
                "use a folder with one subfolder a class, or a list with a class a line",
            )
    test = with_classes_of(train, test)
    rows: list[dict[str, Any]] = []
    if method in ("knn", "both"):
        rows += knn_rows(train, test, network, ks, sigmas, split, device, precision, progress)
    if method in ("linear", "both"):
        with LinearProbe(network, names, _classes(train, test), device, precision) as probe:
            loss = probe.fit(train, epochs, lr, batch_size, aug, seed, progress)
            accuracies = probe.accuracies(test, batch_size)
        for name, (top1, top5) in accuracies.items():
            rows.append(
                _row(name, "linear", "", split, len(test), top1, top5)
                | {"lr": lr, "epoch": epochs, "loss": loss[name]}
            )
    job.once(partial(formats.write_probe, output, rows, provenance, force))
    return rows


def _row(
    layer: str, method: str, setting: str, split: str, count: int, top1: float, top5: float
) -> dict[str, Any]:
    nan = float("nan")
    row = {"layer": layer, "method": method, "head": "", "setting": setting, "lr": nan, "epoch": -1}
    return row | {"split": split, "n": count, "top1": top1, "top5": top5, "loss": nan}


def _classes(train: Images, test: Images) -> int:
    assert train.truth_N is not None and test.truth_N is not None
    return int(max(train.truth_N.max(), test.truth_N.max())) + 1


def with_classes_of(train: Images, test: Images) -> Images:
    """`test` with its classes numbered as those of `train`, by name; new ones come after."""
    if not (train.classes and test.classes) or train.classes == test.classes:
        return test
    names = list(train.classes)
    names += [name for name in test.classes if name not in names]
    numbers = np.array([names.index(name) for name in test.classes])
    renamed = test.subset(np.arange(len(test)))
    assert test.truth_N is not None
    renamed.truth_N, renamed.classes = numbers[test.truth_N], tuple(names)
    return renamed


def _chosen(network: Network, layers: str) -> list[str]:
    known = list(network.layers())
    names = known if layers == "all" else layers.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--layers {name} is none of {', '.join(known)}")
    return names


def features(
    network: Network, images: Images, device: str, precision: str, progress: Progress, note: str
) -> Tensor:
    """The trunk's output for every image, (N, D) float32."""
    blocks: list[Tensor] = []
    done = 0
    for (block,) in forward(network.trunk, network, images, 256, device, precision):
        blocks.append(block)
        done += len(block)
        progress(done, len(images), note)
        if parallel.any_of(interrupt.requested()):
            raise StoppedEarly("probe stopped", "run it again")
    return torch.cat(blocks)


def knn_rows(
    train: Images,
    test: Images,
    network: Network,
    ks: Sequence[int] = (10,),
    sigmas: Sequence[float] = (0.1,),
    split: str = "test",
    device: str = "cpu",
    precision: str = "float32",
    progress: Progress = lambda done, total, note: None,
) -> list[dict[str, Any]]:
    """Weighted kNN accuracy for every k and sigma, as rows of a probe file."""
    assert train.truth_N is not None and test.truth_N is not None
    bank = features(network, train, device, precision, progress, "features of the bank")
    query = features(network, test, device, precision, progress, "features of the test images")
    rows = []
    truth = torch.from_numpy(test.truth_N)
    for k in ks:
        for sigma in sigmas:
            scores = knn_scores(
                bank, torch.from_numpy(train.truth_N), query, _classes(train, test), k, sigma
            )
            top1, top5 = top_accuracies(scores, truth)
            rows.append(
                _row("features", "knn", f"k={k} sigma={sigma:g}", split, len(test), top1, top5)
            )
    return rows


def knn_scores(
    bank_ND: Tensor, truth_N: Tensor, query_MD: Tensor, classes: int, k: int, sigma: float
) -> Tensor:
    """Votes (M, C) of the k nearest by cosine similarity, each weighing exp(similarity / sigma).

    Source: Wu et al. 2018, as used by SeLa (k = 10, sigma = 0.1). Memory: a tile of
    queries by the bank.
    """
    bank_ND = functional.normalize(bank_ND, dim=1)
    k = min(k, len(bank_ND))
    votes = []
    for block in torch.split(functional.normalize(query_MD, dim=1), 512):
        similarity, nearest = (block @ bank_ND.T).topk(k, dim=1)
        # Only ratios count: measured from the nearest, a small sigma does not underflow.
        weights = ((similarity - similarity[:, :1]) / sigma).exp()
        votes.append(torch.zeros(len(block), classes).scatter_add_(1, truth_N[nearest], weights))
    return torch.cat(votes)


def top_accuracies(scores_NC: Tensor, truth_N: Tensor) -> tuple[float, float]:
    """Fractions of rows whose true class scores highest, and among the five highest."""
    five = scores_NC.topk(min(5, scores_NC.shape[1]), dim=1).indices == truth_N[:, None]
    return float(five[:, 0].double().mean()), float(five.any(1).double().mean())


class LinearProbe:
    """A linear classifier on each named layer, all trained in one pass over the data.

    Each reads its layer after max-pooling to about 9,600 numbers and BatchNorm without
    affine parameters (the paper's protocol; its own pooling for AlexNet at 224 pixels).
    """

    def __init__(
        self, network: Network, layers: Sequence[str], classes: int, device: str, precision: str
    ) -> None:
        self.network = network.eval().to(device)
        self.device, self.precision, self.classes = device, precision, classes
        self._maps: dict[str, Tensor] = {}
        self._pools: dict[str, nn.Module] = {}
        self._hooks: list[RemovableHandle] = []
        modules = network.layers()
        self.classifiers = nn.ModuleDict()
        view = torch.zeros(1, 3, network.image_size, network.image_size, device=device)
        for name in layers:
            self._hooks.append(modules[name].register_forward_hook(self._keep(name)))
        with torch.no_grad():
            network.trunk(view)
        for name in layers:
            self._pools[name] = _pooling(network, name, self._maps[name].shape)
            width = self._pools[name](self._maps[name]).flatten(1).shape[1]
            self.classifiers[name] = nn.Sequential(
                BatchNorm1d(width, affine=False), nn.Linear(width, classes)
            )
        self.classifiers.to(device)

    def __enter__(self) -> LinearProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._maps[name] = output

        return hook

    def _logits(self, view: Tensor) -> Mapping[str, Tensor]:
        with torch.no_grad(), autocast(self.device, self.precision):
            self.network.trunk(view.contiguous(memory_format=torch.channels_last))
            inputs = {
                name: self._pools[name](self._maps[name]).flatten(1).float()
                for name in self.classifiers
            }
        return {name: self.classifiers[name](inputs[name]) for name in self.classifiers}

    def fit(
        self,
        images: Images,
        epochs: int,
        lr: float,
        batch_size: int,
        aug: str,
        seed: int,
        progress: Progress,
    ) -> dict[str, float]:
        """Train; the rate falls tenfold at 10/36, 20/36 and 30/36. Returns last epoch's losses."""
        assert images.truth_N is not None
        truth_N = torch.from_numpy(images.truth_N)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for classifier in self.classifiers.values():
                linear = classifier[1]  # type: ignore[index]
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.01)
                linear.bias.zero_()
        optimizer = torch.optim.SGD(
            self.classifiers.parameters(), lr=lr, momentum=0.9, weight_decay=1e-5
        )
        milestones = [max(1, round(epochs * third / 36)) for third in (10, 20, 30)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
        # BatchNorm needs two rows: a last batch of one is left out.
        batch_size = min(batch_size, len(images))
        steps = max(1, len(images) // batch_size)
        # This process's part of each batch, and of the mean over it.
        mine = job.share(batch_size)
        weight = (mine.stop - mine.start) / batch_size
        losses: dict[str, float] = {}
        for epoch in range(epochs):
            self.classifiers.train()
            order = torch.randperm(len(images), generator=generator)
            totals = dict.fromkeys(self.classifiers, 0.0)
            for step in range(steps):
                rows = order[step * batch_size : (step + 1) * batch_size]
                draws = draw(len(rows), images.side, AUGMENTATIONS[aug], generator).of(mine)
                rows = rows[mine]
                view = drawn_view(
                    images.batch(rows).to(self.device), self.network.image_size, draws
                )
                truth_n = truth_N[rows].to(self.device)
                logits = self._logits(view)
                each = {
                    name: weight * functional.cross_entropy(logits[name], truth_n)
                    for name in logits
                }
                optimizer.zero_grad()
                torch.stack(list(each.values())).sum().backward()  # type: ignore[no-untyped-call]
                for parameter in self.classifiers.parameters():
                    assert parameter.grad is not None
                    parallel.sum_of(parameter.grad)
                optimizer.step()
                for name, loss in each.items():
                    totals[name] += float(parallel.sum_of(loss.detach()))
                progress(epoch * steps + step + 1, epochs * steps, "linear classifiers")
                if parallel.any_of(interrupt.requested()):
                    raise StoppedEarly("probe stopped", "run it again")
            scheduler.step()
            losses = {name: total / steps for name, total in totals.items()}
        return losses

    @torch.no_grad()
    def accuracies(self, images: Images, batch_size: int) -> dict[str, tuple[float, float]]:
        """Top-1 and top-5 of each layer on the centre views."""
        assert images.truth_N is not None
        self.classifiers.eval()
        scores: dict[str, list[Tensor]] = {name: [] for name in self.classifiers}
        names = list(self.classifiers)
        outputs = passes.in_order(
            images,
            self.network.image_size,
            lambda view: list(self._logits(view).values()),
            [self.classes] * len(names),
            batch_size,
            self.device,
        )
        for batch in outputs:
            for name, logits in zip(names, batch, strict=True):
                scores[name].append(logits)
        truth_N = torch.from_numpy(images.truth_N)
        return {name: top_accuracies(torch.cat(parts), truth_N) for name, parts in scores.items()}


def _pooling(network: Network, name: str, shape: Sequence[int]) -> nn.Module:
    if "alexnet" in network.arch and network.image_size > SMALL:
        return nn.MaxPool2d(*_PAPER_POOLING[name])
    channels, side = shape[1], shape[2]
    fitting = max(1, int((_LINEAR_INPUTS / channels) ** 0.5))
    return nn.AdaptiveMaxPool2d(min(side, fitting))
