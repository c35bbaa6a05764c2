"""Optional packages: each extra names the one it is for. Standard library only."""

from __future__ import annotations

from importlib import import_module

from sela_cli.errors import MissingExtra

EXTRAS = {"report": "matplotlib", "parquet": "pyarrow", "tensorboard": "tensorboard"}


def require(extra: str) -> None:
    """Raises MissingExtra, before any work is done, where the package of `extra` is not there."""
    package = EXTRAS[extra]
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtra(
            f"this needs {package}, which is not installed", f"pip install 'sela[{extra}]'"
        ) from error
