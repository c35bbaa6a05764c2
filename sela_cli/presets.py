"""Named settings: the constants of the paper for each data set, and the embedded demo.

Names are those of the options of `sela run`; any option given there overrides them.
"""

from __future__ import annotations

from typing import Any

_IMAGENET: dict[str, Any] = {
    "image_size": 224,
    "lamb": 25.0,
    "epochs": 400.0,
    "opts": 100,
    "relabel": "quadratic",
    "batch_size": 256,
    "lr": 0.05,
    "lr_milestones": (0.375, 0.75, 0.875),
    "weight_decay": 1e-5,
    "aug": "imagenet",
    "store": "features",
    "dtype": "float16",
}
_CIFAR: dict[str, Any] = {
    "arch": "alexnet",
    "image_size": 224,
    "lamb": 10.0,
    "epochs": 400.0,
    "opts": 400,
    "relabel": "linear",
    "batch_size": 128,
    "lr": 0.03,
    "lr_milestones": (0.6, 0.8),
    "weight_decay": 5e-4,
    "aug": "paper",
    # One head a round, as the reference has it.
    "relabel_heads": "cycle",
    # Clusters of centre views stop improving early: see docs/method.md.
    "view": "random",
}

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet-alexnet": _IMAGENET | {"arch": "alexnet", "heads": "3000x10"},
    "imagenet-resnet50": _IMAGENET | {"arch": "resnet50", "heads": "3000x10"},
    "cifar10": _CIFAR | {"heads": "128x10"},
    "cifar100": _CIFAR | {"heads": "512x10"},
    "svhn": _CIFAR | {"heads": "128x1"},
    "digits": _CIFAR
    | {
        "arch": "resnet18",
        # Digits of 8 pixels lose nothing at 16, and train four times as fast as at 32.
        "image_size": 16,
        "heads": "10,20,40,80",
        "relabel_heads": "all",
        # Learning the labels of random heads would lose what a fresh network knows of digits.
        "head_init": "kmeans",
        "epochs": 16.0,
        "opts": 9,
        "relabel": "linear",
        "batch_size": 64,
        "aug": "crop",
        # Twice as fast on a processor that is made for bfloat16, many times slower on others.
        "precision": "auto",
    },
}


def preset(name: str | None) -> dict[str, Any]:
    """The settings of a preset; none for None. `name` is checked by the caller."""
    return dict(PRESETS[name]) if name else {}


# The paper's Table 5: 90 epochs, the rate falls tenfold every 30.
_RETRAIN: dict[str, Any] = {"epochs": 90.0, "lr_milestones": (1 / 3, 2 / 3)}
# With RotNet's task the reference takes 64 images a batch, each in four turns.
_TURNED: dict[str, Any] = _RETRAIN | {"batch_size": 64}


def retraining(rotation: bool) -> dict[str, Any]:
    """Settings of `sela retrain`, with and without RotNet's task."""
    return dict(_TURNED if rotation else _RETRAIN)


# The paper's probes. The large-scale linear ones depend on the kind of network.
_LINEAR_ALEXNET: dict[str, Any] = {
    "method": "linear",
    "layers": "all",
    "epochs": 36,
    "lr": (0.01,),
    "lr_milestones": (10 / 36, 20 / 36, 30 / 36),
    "batch_size": 192,
    "weight_decay": 1e-5,
    "aug": "imagenet-crop-flip",
    "crops": 10,
}
_LINEAR_RESNET: dict[str, Any] = _LINEAR_ALEXNET | {
    "layers": "features",
    "epochs": 146,
    "lr": (0.1,),
    "lr_milestones": (85 / 146, 128 / 146),
    "batch_size": 1024,
    "weight_decay": 0.0,
    "crops": 1,
}
_KNN: dict[str, Any] = {
    "method": "knn",
    "k": (200, 50, 10, 5, 1),
    "sigma": (0.1, 0.5),
    "pca": 128,
}
_SMALL_LINEAR: dict[str, Any] = _LINEAR_ALEXNET | {
    "lr": (0.1, 0.03, 0.01, 0.003),
    "aug": "crop-flip",
    "crops": 1,
}


def protocol(name: str | None, arch: str) -> dict[str, Any]:
    """Settings of `sela probe` for a named protocol and a network; none for None."""
    if name is None:
        return {}
    if name == "knn":
        return dict(_KNN)
    if name == "small-linear":
        return dict(_SMALL_LINEAR)
    assert name in ("imagenet-linear", "places-linear")
    # Places is probed as ImageNet is: the networks have seen neither's classes.
    return dict(_LINEAR_ALEXNET if "alexnet" in arch else _LINEAR_RESNET)
