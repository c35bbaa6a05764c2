"""The sizes that clusters are to have, as `--marginal` names them. K clusters."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from sela_cli.errors import BadData, NoInput, UsageError


def marginal(spec: str, clusters: int) -> Tensor:
    """Wanted share of each cluster, float64, positive, sums to 1.

    `uniform`; `zipf:S`, r_k ~ (k + 1)^-S; `gaussian:S`, shares normally distributed about
    1/K with standard deviation S/K (quantiles, cut at a hundredth of 1/K); or the path of
    K weights (.npy, or text with spaces, commas or line ends between them).
    """
    name, _, parameter = spec.partition(":")
    k = np.arange(clusters)
    if marginal_file(spec) is not None:
        weights_K = _weights_of_file(spec)
        if weights_K.shape != (clusters,):
            raise BadData(f"{spec}: {weights_K.size} weights for {clusters} clusters")
    elif spec == "uniform":
        weights_K = np.ones(clusters)
    else:
        try:
            by = float(parameter)
        except ValueError:
            raise UsageError(f"--marginal {spec}: '{parameter}' is not a number") from None
        if name == "zipf":
            weights_K = (k + 1.0) ** -by
        else:
            weights_K = np.maximum(1 + by * ndtri((k + 0.5) / clusters), 0.01)
    if not (np.isfinite(weights_K).all() and (weights_K > 0).all()):
        raise BadData(f"--marginal {spec}: weights must be positive and finite")
    return torch.from_numpy(weights_K / weights_K.sum())


def marginal_file(spec: str) -> str | None:
    """The file that `spec` names, if it names one."""
    made = spec == "uniform" or spec.partition(":")[0] in ("zipf", "gaussian")
    return None if made else spec


def _weights_of_file(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise NoInput(f"--marginal {path}: neither uniform, zipf:S, gaussian:S nor a file")
    try:
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False).astype(np.float64).ravel()
        with warnings.catch_warnings():
            # That a file is empty is for the caller to say.
            warnings.simplefilter("ignore")
            # Spreadsheets write commas, and a mark of the byte order.
            text = Path(path).read_text("utf-8-sig").replace(",", " ")
            return np.loadtxt(text.splitlines(), dtype=np.float64, ndmin=1).ravel()
    except (ValueError, OSError, EOFError) as error:
        raise BadData(f"{path}: not a list of numbers ({error})") from error
