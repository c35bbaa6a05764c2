"""Randomness as a function of a seed and of a place in the work, so that no state is kept."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for every purpose and number."""
    text = f"{seed}/{purpose}/{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")


def generator_of(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for every purpose and number."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, number))
