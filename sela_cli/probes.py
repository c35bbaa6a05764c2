"""Stage 4: images + checkpoint -> probe. How good are the features, by true classes.

N images, M test images, n of a batch, D features, C classes, k neighbours. The network is
frozen and in eval mode throughout. Nothing is chosen on the images that are reported on:
of several learning rates a held-out part of the training images chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sela_cli import formats, interrupt, job, outputs, parallel, passes, schedule
from sela_cli.batchwide import BatchNorm2d
from sela_cli.devices import sent
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, StoppedEarly, UsageError
from sela_cli.formats import Checkpoint
from sela_cli.images.augment import AUGMENTATIONS
from sela_cli.images.batches import Images
from sela_cli.images.sources import no_classes
from sela_cli.logits import forward
from sela_cli.networks import Network, arrays_of, load_arrays
from sela_cli.precision import autocast
from sela_cli.progress import Progress, silent
from sela_cli.unfinished import Unfinished, momentum_of, restore_momentum

METHODS = ("linear", "knn", "both")
# The trunk's output, which kNN compares and which linear probes can read like a layer.
FEATURES = "features"
CROPS = (1, 10)
# Options that a method has no use for.
_NOT_OF = {
    "knn": (
        *("layers", "epochs", "lr", "lr_milestones", "validation", "batch_size"),
        *("weight_decay", "aug", "crops"),
    ),
    "linear": ("k", "sigma", "pca"),
}

# The paper's pooling before the linear classifiers of AlexNet at 224 pixels: (kernel,
# stride, padding), about 9,600 inputs each.
_PAPER_POOLING = {
    "conv1": (6, 6, 3),
    "conv2": (4, 4, 0),
    "conv3": (3, 3, 1),
    "conv4": (3, 3, 1),
    "conv5": (2, 2, 0),
}
_PAPER_SIZE = 224
_LINEAR_INPUTS = 9600
# Queries that are compared with the bank at a time; rows of the bank that are centred.
_ROWS = 512


def holdout(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """A seeded split into bank and test images, for collections without a test set."""
    order = np.random.default_rng(seed).permutation(len(images))
    if len(images) < 2:
        raise BadData(f"{images.spec}: one image can't be split in two", "use more images")
    tested = min(max(1, round(fraction * len(images))), len(images) - 1)
    return images.subset(np.sort(order[tested:])), images.subset(np.sort(order[:tested]))


@dataclass(frozen=True)
class LinearRecipe:
    """How linear probes are trained; the defaults are the paper's for AlexNet.

    `milestones` are fractions of the epochs at which the rate falls tenfold. `validation`
    is the share of the training images that chooses among several rates. `crops` is 10 for
    the mean logits of four corners, the centre, and their mirror images.
    """

    epochs: int = 36
    lrs: tuple[float, ...] = (0.01,)
    milestones: tuple[float, ...] = (10 / 36, 20 / 36, 30 / 36)
    batch_size: int = 192
    weight_decay: float = 1e-5
    aug: str = "crop-flip"
    crops: int = 1
    validation: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError where an option has no meaning."""
        for option, value, known in (
            ("--aug", self.aug, tuple(AUGMENTATIONS)),
            ("--crops", self.crops, CROPS),
        ):
            if value not in known:
                raise UsageError(f"{option} {value} is none of {', '.join(map(str, known))}")
        if not self.lrs or not min(self.lrs) > 0 or len(set(self.lrs)) < len(self.lrs):
            raise UsageError("--lr takes positive rates, each once")
        for option, number, least in (
            ("--epochs", self.epochs, 1),
            ("--batch-size", self.batch_size, 2),
            ("--weight-decay", self.weight_decay, 0),
        ):
            if not least <= number < math.inf:
                raise UsageError(f"{option} {number} must be at least {least} and finite")
        if not 0 < self.validation < 1:
            raise UsageError(f"--validation {self.validation} must lie between 0 and 1")
        if not schedule.are_fractions(self.milestones):
            raise UsageError("--lr-milestones are fractions of the epochs, 0 to 1")


@dataclass(frozen=True)
class KnnRecipe:
    """What weighted kNN sweeps; `pca` adds every setting on so many principal components."""

    ks: tuple[int, ...] = (10,)
    sigmas: tuple[float, ...] = (0.1,)
    pca: int | None = None

    def check(self) -> None:
        """Raises UsageError where an option has no meaning."""
        if not self.ks or min(self.ks) < 1 or not self.sigmas or not min(self.sigmas) > 0:
            raise UsageError("--k must be at least 1, --sigma positive")
        if self.pca is not None and self.pca < 1:
            raise UsageError("--pca must be at least 1")


def recipes(options: Mapping[str, Any]) -> tuple[LinearRecipe, KnnRecipe]:
    """Both recipes from options of `sela probe` by name; what is not given has its default."""
    names = {"lr": "lrs", "lr_milestones": "milestones", "k": "ks", "sigma": "sigmas"}
    renamed = {names.get(name, name): value for name, value in options.items()}
    linear, knn = (
        {field.name: renamed[field.name] for field in fields(kind) if field.name in renamed}
        for kind in (LinearRecipe, KnnRecipe)
    )
    return LinearRecipe(**linear), KnnRecipe(**knn)


def check_asked(asked: Collection[str], method: str, linear: LinearRecipe) -> None:
    """Raises UsageError where an option that was given would change nothing."""
    for name in asked:
        if name in _NOT_OF.get(method, ()):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is not for --method {method}", "use --method both")
    if "validation" in asked and len(linear.lrs) == 1:
        raise UsageError("--validation chooses among several rates", "name them by --lr")


def possible(knn: KnnRecipe, train: Images, network: Network, asked: Collection[str]) -> KnnRecipe:
    """`knn` with no more principal components than the bank has.

    Raises UsageError where --pca asked for more: a protocol's number is for large banks.
    """
    most = min(len(train), network.width)
    if knn.pca is None or knn.pca <= most:
        return knn
    if "pca" in asked:
        count = f"{len(train)} images of {network.width} features"
        raise UsageError(f"--pca {knn.pca}: {count} have at most {most} components")
    return replace(knn, pca=most)


def settings(
    network: Network, method: str, layers: str, linear: LinearRecipe, knn: KnnRecipe
) -> dict[str, Any]:
    """Everything that a method is told, whether it was given or is a default."""
    told: dict[str, Any] = {"method": method}
    if method in ("linear", "both"):
        told |= {"layers": chosen_layers(network, layers), "linear": asdict(linear)}
    if method in ("knn", "both"):
        told["knn"] = asdict(knn)
    return told


def plan(
    train: Images,
    test: Images,
    network: Network,
    method: str,
    layers: str,
    linear: LinearRecipe,
    knn: KnnRecipe,
) -> dict[str, Any]:
    """What a dry run shows. Raises BadData where classes are not known."""
    _check_classes(train, test)
    shown = {"train": len(train), "test": len(test), "arch": network.arch}
    shown["classes"] = _classes(train, with_classes_of(train, test))
    return shown | settings(network, method, layers, linear, knn)


def _check_classes(train: Images, test: Images) -> None:
    for images in (train, test):
        if images.truth_N is None:
            # All of the source, not only those at hand: what is to be moved is there.
            raise no_classes(images.spec, images.source.keys)
    # Test images of classes that training has not count as wrong: here all of them would.
    if train.classes and test.classes and not set(train.classes) & set(test.classes):
        raise BadData(
            f"{train.spec} and {test.spec} have no class in common: one has "
            f"'{train.classes[0]}', the other '{test.classes[0]}'",
            "call the classes of both the same",
        )


def probe_stage(
    train: Images,
    test: Images,
    network: Network,
    output: str,
    provenance: Provenance,
    *,
    method: str = "both",
    layers: str = "all",
    linear: LinearRecipe = LinearRecipe(),
    knn: KnnRecipe = KnnRecipe(),
    device: str = "cpu",
    precision: str = "float32",
    split: str = "test",
    force: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Measure kNN and linear accuracy on `test` and write a probe file. Both need `truth`.

    A signal while linear probes are trained or measured saves their state beside `output`
    and raises StoppedEarly; the same call then goes on from there.
    """
    outputs.check_output(output, force)
    job.meet()
    if method not in METHODS:
        raise UsageError(f"--method {method} is none of {', '.join(METHODS)}")
    linear.check()
    knn.check()
    names = chosen_layers(network, layers)
    _check_classes(train, test)
    test = with_classes_of(train, test)
    identity = {
        "parameters": provenance.parameters,
        "inputs": [entry["digest"] for entry in provenance.inputs],
        "images": [train.dataset_id, test.dataset_id],
        "truth": [images.truth_digest for images in (train, test)],
        "layers": names,
        "recipe": asdict(linear) | {"precision": precision},
        "device": device.split(":")[0],
    }
    unfinished = Unfinished(output, "probe", identity, force)
    rows: list[dict[str, Any]] = []
    if method in ("knn", "both"):
        knn = possible(knn, train, network, ("pca",))
        rows += knn_rows(train, test, network, knn, split, device, precision, progress)
    if method in ("linear", "both"):
        rows += linear_rows(
            train,
            test,
            network,
            names,
            linear,
            split=split,
            device=device,
            precision=precision,
            progress=progress,
            unfinished=unfinished,
        )

    def write() -> None:
        formats.write_probe(output, rows, provenance, force)
        unfinished.remove()

    job.once(write)
    return rows


def linear_rows(
    train: Images,
    test: Images,
    network: Network,
    layers: Sequence[str],
    recipe: LinearRecipe,
    *,
    split: str,
    device: str,
    precision: str,
    progress: Progress,
    unfinished: Unfinished,
) -> list[dict[str, Any]]:
    """Linear accuracy of every layer, as rows of a probe file.

    With several rates: first each one's accuracy on the held-out part of `train`, which
    then has no part in the training; last, for each layer, the best one's on `test`.
    Where the loss of the last epoch is not finite accuracies are NaN, and not chosen.
    A signal leaves the state in `unfinished` and raises StoppedEarly.
    """
    classes = _classes(train, test)
    parts = [train]
    if len(recipe.lrs) > 1:
        parts = list(holdout(train, recipe.validation, recipe.seed))
    rows: list[dict[str, Any]] = []
    with LinearProbe(network, layers, classes, recipe, device, precision) as probe:
        losses = probe.fit(parts[0], progress, unfinished)

        def add(images: Images, where: str, rates: Mapping[str, Sequence[float]]) -> None:
            for (name, lr), (top1, top5) in probe.accuracies(images, rates, progress).items():
                if not math.isfinite(losses[name, lr]):
                    # It has learned nothing, but some class always scores highest.
                    top1 = top5 = math.nan
                setting = f"crops={recipe.crops}"
                row = _row(name, "linear", setting, where, len(images), top1, top5)
                rows.append(row | {"lr": lr, "epoch": recipe.epochs, "loss": losses[name, lr]})

        best = dict.fromkeys(layers, recipe.lrs[0])
        # Trained they are: after a signal the next call is to measure only.
        with unfinished.kept(probe.state):
            if len(recipe.lrs) > 1:
                where = f"validation {recipe.validation:g}"
                add(parts[1], where, dict.fromkeys(layers, recipe.lrs))
                for name in layers:
                    of_layer = [row for row in rows if row["layer"] == name]
                    best[name] = max(of_layer, key=_rank)["lr"]
            add(test, split, {name: [lr] for name, lr in best.items()})
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
    names = {name: number for number, name in enumerate(train.classes)}
    numbers = np.array([names.setdefault(name, len(names)) for name in test.classes])
    renamed = test.subset(np.arange(len(test)))
    assert test.truth_N is not None
    renamed.truth_N, renamed.classes = numbers[test.truth_N], tuple(names)
    return renamed


def chosen_layers(network: Network, layers: str) -> list[str]:
    """`all` named layers, or those of a list; `features` is the trunk's output."""
    known = list(network.layers())
    names = known if layers == "all" else layers.split(",")
    for name in names:
        if name not in (*known, FEATURES):
            raise UsageError(f"--layers {name} is none of {', '.join((*known, FEATURES))}")
    if len(set(names)) < len(names):
        raise UsageError(f"--layers {layers} names a layer twice")
    return names


def features(
    network: Network, images: Images, device: str, precision: str, progress: Progress, note: str
) -> Tensor:
    """The trunk's output for every image, (N, D) float32. Raises BadData where not finite."""
    features_ND = torch.empty(len(images), network.width)
    done = 0
    for (block_nD,) in forward(network, images, 256, device, precision, features=True):
        bad_n = ~block_nD.isfinite().all(1)
        if bad_n.any():
            key = images.keys[done + int(bad_n.nonzero()[0, 0])]
            raise BadData(
                f"the checkpoint's features of '{key}' are not finite", "use another checkpoint"
            )
        features_ND[done : done + len(block_nD)] = block_nD
        done += len(block_nD)
        progress(done, len(images), note)
        _end_if_asked()
    return features_ND


def _end_if_asked() -> None:
    if parallel.any_of(interrupt.requested()):
        raise StoppedEarly("probe stopped", "run it again")


def knn_rows(
    train: Images,
    test: Images,
    network: Network,
    recipe: KnnRecipe = KnnRecipe(),
    split: str = "test",
    device: str = "cpu",
    precision: str = "float32",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Weighted kNN accuracy for every k and sigma, as rows of a probe file."""
    assert train.truth_N is not None and test.truth_N is not None
    classes_N, truth_M = torch.from_numpy(train.truth_N), torch.from_numpy(test.truth_N)
    # A bank has no more neighbours than images: each setting is what it was, and there once.
    ks = dict.fromkeys(min(k, len(train)) for k in recipe.ks)
    sweep = [(k, sigma) for k in ks for sigma in recipe.sigmas]
    bank_ND = features(network, train, device, precision, progress, "features of the bank")
    query_MD = features(network, test, device, precision, progress, "features of the test images")
    spaces = [("", bank_ND, query_MD)]
    if recipe.pca:
        few = principal_components(bank_ND, query_MD, recipe.pca)
        spaces.append((f" pca={recipe.pca}", *few))
    rows = []
    for name, bank, query in spaces:
        bank, query = bank.to(device), query.to(device)
        hits = knn_hits(bank, classes_N, query, truth_M, sweep, progress)
        for (k, sigma), found in zip(sweep, hits, strict=True):
            top1, top5 = _fractions(found, len(test))
            setting = f"k={k} sigma={sigma:g}{name}"
            rows.append(_row(FEATURES, "knn", setting, split, len(test), top1, top5))
    return rows


def principal_components(bank_ND: Tensor, query_MD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Both in the `count` directions in which the bank varies most.

    Memory: D x D and what is returned. scikit-learn's PCA would centre a copy of the bank.
    """
    assert count <= min(bank_ND.shape)
    mean_D = bank_ND.mean(0)
    scatter_DD = torch.zeros(len(mean_D), len(mean_D))
    for block_nD in torch.split(bank_ND, _ROWS):
        centred_nD = block_nD - mean_D
        scatter_DD.addmm_(centred_nD.T, centred_nD)
    directions_Dk = torch.linalg.eigh(scatter_DD).eigenvectors[:, -count:].flip(1)
    shift_k = -mean_D @ directions_Dk
    return (
        torch.addmm(shift_k, bank_ND, directions_Dk),
        torch.addmm(shift_k, query_MD, directions_Dk),
    )


def knn_hits(
    bank_ND: Tensor,
    classes_N: Tensor,
    query_MD: Tensor,
    truth_M: Tensor,
    sweep: Sequence[tuple[int, float]],
    progress: Progress = silent,
) -> Tensor:
    """`top_hits` of the queries for every (k, sigma) of `sweep`, (S, 2).

    Each process searches for a part of the queries. Memory: 512 queries by the bank.
    """
    hits = torch.zeros(len(sweep), 2, dtype=torch.int64)
    classes = int(classes_N.max()) + 1
    most = max(k for k, _ in sweep)
    # What is all zeros is similar to nothing.
    lengths_N = bank_ND.norm(dim=1).clamp(min=1e-12)
    count, step = len(query_MD), _ROWS * parallel.size()
    for start in range(0, count, step):
        # Blocks are those of one process, which products of other shapes might round
        # otherwise. In the last round some processes may have none.
        first = start + _ROWS * parallel.rank()
        mine = slice(first, first + _ROWS)
        similarity_nk, nearest_nk = neighbours(bank_ND, lengths_N, query_MD[mine], most)
        classes_nk = classes_N[nearest_nk]
        for number, (k, sigma) in enumerate(sweep):
            votes_nC = votes(similarity_nk[:, :k], classes_nk[:, :k], classes, sigma)
            # Of classes without a vote any may come next.
            hits[number] += top_hits(votes_nC, truth_M[mine], above=0.0)
        progress(min(start + step, count), count, "nearest neighbours")
        _end_if_asked()
    return parallel.sum_of(hits)


def neighbours(
    bank_ND: Tensor, lengths_N: Tensor, query_nD: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and rows of the k nearest, nearest first, both (n, k), on the CPU.

    `lengths_N` are those of the bank's rows: to divide these by them would take a copy.
    """
    similarity_nN = functional.normalize(query_nD, dim=1) @ bank_ND.T
    similarity_nN /= lengths_N
    found = similarity_nN.topk(min(k, len(bank_ND)), dim=1)
    return found.values.cpu(), found.indices.cpu()


def votes(similarity_Mk: Tensor, classes_Mk: Tensor, classes: int, sigma: float) -> Tensor:
    """Votes (M, C) of the neighbours, each weighing exp(similarity / sigma).

    Source: Wu et al. 2018, as used by SeLa (k = 10, sigma = 0.1).
    """
    # Only ratios count: measured from the nearest, a small sigma does not underflow.
    weights = ((similarity_Mk - similarity_Mk[:, :1]) / sigma).exp()
    return torch.zeros(len(weights), classes).scatter_add_(1, classes_Mk, weights)


def top_hits(scores_nC: Tensor, truth_n: Tensor, above: float = -math.inf) -> Tensor:
    """Rows whose true class scores highest, and among the five highest: (2,) int64.

    Only scores `above` this count.
    """
    five = scores_nC.topk(min(5, scores_nC.shape[1]), dim=1)
    hits_n5 = (five.indices == truth_n[:, None]) & (five.values > above)
    return torch.stack([hits_n5[:, 0].sum(), hits_n5.any(1).sum()])


def _rank(row: Mapping[str, Any]) -> float:
    """By its top-1 accuracy, and last without one."""
    top1: float = row["top1"]
    return -1.0 if math.isnan(top1) else top1


def _fractions(hits: Tensor, count: int) -> tuple[float, float]:
    """Top-1 and top-5 accuracy from `top_hits` of so many rows."""
    top1, top5 = (hits.double() / count).tolist()
    return top1, top5


class LinearProbe:
    """A linear classifier for each named layer and rate, all trained in one pass over the data.

    Each reads its layer after max-pooling to about 9,600 numbers and BatchNorm without
    affine parameters (the paper's protocol; its own pooling for AlexNet at 224 pixels).
    The trunk's output is read as it is.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[str],
        classes: int,
        recipe: LinearRecipe,
        device: str,
        precision: str,
    ) -> None:
        self.network = network.eval().to(device)
        self.recipe, self.classes = recipe, classes
        self.device, self.precision = device, precision
        self._maps: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        modules = {**network.layers(), FEATURES: network.trunk}
        view = torch.zeros(1, 3, network.image_size, network.image_size, device=device)
        for name in layers:
            self._hooks.append(modules[name].register_forward_hook(self._keep(name)))
        with torch.no_grad():
            network.trunk(view)
        # Inputs of a layer are the same for every rate, and so are their statistics.
        self.inputs = nn.ModuleDict()
        self.classifiers = nn.ModuleDict()
        for name in layers:
            self.inputs[name] = _inputs(network, name, self._maps[name].shape).to(device)
            width = self.inputs[name].eval()(self._maps[name]).shape[1]
            self.classifiers[name] = nn.ModuleList(nn.Linear(width, classes) for _ in recipe.lrs)
        self.classifiers.to(device)
        # Of each classifier, the sum of its losses in the running epoch.
        count = len(layers) * len(recipe.lrs)
        self.totals = torch.zeros(count, dtype=torch.float64, device=device)
        self._kept = nn.ModuleDict({"inputs": self.inputs, "classifiers": self.classifiers})
        self._kept.register_buffer("totals", self.totals)

    def __enter__(self) -> LinearProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._maps[name] = output

        return hook

    def _logits(
        self, view: Tensor, rates: Mapping[str, Sequence[float]]
    ) -> dict[tuple[str, float], Tensor]:
        """Logits of the classifiers of these rates of each layer."""
        with torch.no_grad():
            with autocast(self.device, self.precision):
                self.network.trunk(view.contiguous(memory_format=torch.channels_last))
            inputs = {name: self.inputs[name](self._maps[name].float()) for name in rates}
        return {
            (name, lr): self._classifier(name, lr)(inputs[name])
            for name, chosen in rates.items()
            for lr in chosen
        }

    def _classifier(self, name: str, lr: float) -> nn.Module:
        classifiers = self.classifiers[name]
        assert isinstance(classifiers, nn.ModuleList)
        return classifiers[self.recipe.lrs.index(lr)]

    def _initialise(self, generator: torch.Generator) -> None:
        """The same start for every rate of a layer."""
        for classifiers in self.classifiers.values():
            first = next(classifiers.parameters())
            start = torch.randn(first.shape, generator=generator) * 0.01
            for linear in classifiers.children():
                assert isinstance(linear, nn.Linear)
                with torch.no_grad():
                    linear.weight.copy_(start)
                    linear.bias.zero_()

    def fit(
        self, images: Images, progress: Progress, unfinished: Unfinished
    ) -> dict[tuple[str, float], float]:
        """Train all of them. Returns the mean loss of each in the last epoch."""
        assert images.truth_N is not None
        truth_N = torch.from_numpy(images.truth_N)
        recipe, layers = self.recipe, list(self.classifiers)
        each = [(name, lr) for name in layers for lr in recipe.lrs]
        self._initialise(torch.Generator().manual_seed(recipe.seed))
        self.optimizer = torch.optim.SGD(
            [{"params": self._classifier(name, lr).parameters(), "lr": lr} for name, lr in each],
            momentum=0.9,
            weight_decay=recipe.weight_decay,
        )
        self.step = 0
        left = unfinished.read()
        if left:
            self._restore(left, str(unfinished.path))
        milestones = [max(1, round(recipe.epochs * part)) for part in recipe.milestones]
        # Whole batches only: BatchNorm would take the statistics of what few are left.
        batch_size = passes.shared_batch(recipe.batch_size, len(images))
        self.steps = steps = max(1, len(images) // batch_size)
        last = recipe.epochs * steps
        # This process's part of each batch, and of the mean over it.
        mine = job.share(batch_size)
        weight = (mine.stop - mine.start) / batch_size
        rates = dict.fromkeys(layers, recipe.lrs)
        self.inputs.train()
        rest = range(self.step, last)
        for rows_n, view in passes.at_random(
            images, self.network.image_size, recipe.aug, recipe.seed, rest, batch_size,
            self.device, purpose="probe ",
        ):  # fmt: skip
            epoch, place = divmod(self.step, steps)
            if place == 0:
                self.totals.zero_()
            fallen = 0.1 ** sum(milestone <= epoch for milestone in milestones)
            for group, (_, lr) in zip(self.optimizer.param_groups, each, strict=True):
                group["lr"] = lr * fallen
            truth_n = sent(truth_N[rows_n], self.device)
            logits = self._logits(view, rates)
            # No two share a parameter: the gradient of the sum is each one's own.
            losses = torch.stack(
                [weight * functional.cross_entropy(logits[key], truth_n) for key in each]
            )
            self.optimizer.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            for parameter in self.classifiers.parameters():
                assert parameter.grad is not None
                parallel.sum_of(parameter.grad)
            self.optimizer.step()
            # There, so that a GPU is not waited for.
            self.totals += parallel.sum_of(losses.detach())
            self.step += 1
            progress(self.step * batch_size, last * batch_size, "linear classifiers")
            unfinished.after_step(self.step, last, self.state)
        return dict(zip(each, (self.totals / steps).tolist(), strict=True))

    def state(self) -> Checkpoint:
        """Where `fit` is, to go on from."""
        return Checkpoint(
            model=arrays_of(self._kept),
            optimizer=momentum_of(self.classifiers, self.optimizer),
            arch=self.network.arch,
            image_size=self.network.image_size,
            heads=[self.classes],
            step=self.step,
            epoch=self.step / self.steps,
            recipe=asdict(self.recipe) | {"precision": self.precision},
        )

    def _restore(self, left: Checkpoint, path: str) -> None:
        self.step = left.step
        load_arrays(self._kept, left.model, f"{path}: does not fit this probe")
        restore_momentum(self.classifiers, self.optimizer, left.optimizer, path)

    @torch.no_grad()
    def accuracies(
        self,
        images: Images,
        rates: Mapping[str, Sequence[float]],
        progress: Progress = silent,
    ) -> dict[tuple[str, float], tuple[float, float]]:
        """Top-1 and top-5 for these rates of each layer, on the centre views or on ten crops."""
        assert images.truth_N is not None
        self.inputs.eval()
        crops = self.recipe.crops
        each = [(name, lr) for name, chosen in rates.items() for lr in chosen]
        truth_N = torch.from_numpy(images.truth_N)
        hits = {key: torch.zeros(2, dtype=torch.int64) for key in each}

        def all_logits(view: Tensor) -> Tensor:
            logits = self._logits(view, rates)
            return torch.cat([logits[key] for key in each], 1)

        batches = (passes.in_order if crops == 1 else passes.over_ten_crops)(
            images,
            self.network.image_size,
            all_logits,
            [self.classes] * len(each),
            max(1, self.recipe.batch_size // crops),
            self.device,
        )
        done = 0
        for batch in batches:
            truth_n = truth_N[done : done + len(batch[0])]
            for key, logits in zip(each, batch, strict=True):
                hits[key] += top_hits(logits, truth_n)
            done += len(truth_n)
            progress(done, len(images), "test images")
            _end_if_asked()
        return {key: _fractions(found, done) for key, found in hits.items()}


def _inputs(network: Network, name: str, shape: Sequence[int]) -> nn.Module:
    if name == FEATURES:
        return nn.Identity()
    channels, side = shape[1], shape[2]
    pool: nn.Module
    if "alexnet" in network.arch and network.image_size == _PAPER_SIZE:
        pool = nn.MaxPool2d(*_PAPER_POOLING[name])
    else:
        fitting = max(1, int((_LINEAR_INPUTS / channels) ** 0.5))
        pool = nn.AdaptiveMaxPool2d(min(side, fitting))
    return nn.Sequential(pool, BatchNorm2d(channels, affine=False), nn.Flatten())
