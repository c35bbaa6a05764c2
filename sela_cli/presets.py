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
        "arch": "alexnet-small",
        # Digits of 8 pixels lose nothing at 16, and train four times as fast as at 32.
        "image_size": 16,
        "heads": "10,20,40,80",
        "relabel_heads": "all",
        "epochs": 40.0,
        "opts": 20,
        "relabel": "linear",
        "batch_size": 64,
        "aug": "crop",
    },
}


def preset(name: str | None) -> dict[str, Any]:
    """The settings of a preset; none for None. `name` is checked by the caller."""
    return dict(PRESETS[name]) if name else {}
