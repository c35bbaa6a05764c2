"""Optional packages: each extra names those it is for. Standard library only."""

from __future__ import annotations

from importlib import import_module

from sela_cli.errors import MissingExtra

EXTRAS = {
    "report": ("matplotlib",),
    "parquet": ("pyarrow",),
    "tensorboard": ("tensorboard",),
    # torch.onnx and torchmetrics need the second of theirs, and say so late.
    "onnx": ("onnx", "onnxscript"),
    "voc": ("torchmetrics", "pycocotools"),
}


def require(extra: str) -> None:
    """Raises MissingExtra, before any work is done, where a package of `extra` is not there."""
    for package in EXTRAS[extra]:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtra(
                f"this needs {package}, which is not installed", f"pip install 'sela[{extra}]'"
            ) from error
