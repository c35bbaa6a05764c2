"""The processor that this runs on."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path


@cache
def _cpuinfo() -> str:
    """What Linux says of it; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def processor() -> str:
    """Its name."""
    found = re.search(r"model name\s*: (.*)", _cpuinfo())
    return found[1].strip() if found else platform.processor() or platform.machine()


def has_fast_bfloat16() -> bool:
    """Whether it multiplies bfloat16; elsewhere torch emulates that slowly."""
    return "avx512_bf16" in _cpuinfo()


@cache
def has_matrix_units() -> bool:
    """Whether it multiplies matrices of bfloat16 in units of their own."""
    return "amx_bf16" in _cpuinfo()
