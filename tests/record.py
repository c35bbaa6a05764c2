"""Recorded measurements in docs/reliability.md: each script writes its own section there."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from sela_cli.machine import processor

# As given: a script may give others to what it calls.
_COMMAND = shlex.join(["python", f"tests/{Path(sys.argv[0]).name}", *sys.argv[1:]])
PACKAGES = ("torch", "numpy", "h5py", "scikit-learn")


def machine() -> str:
    """Processor, cores, how busy they are, and versions in words."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    python = f"Python {platform.python_version()}"
    cores = f"{os.cpu_count()} cores, load average {os.getloadavg()[1]:.0f}"
    return f"{processor()}, {cores}; {python}, {versions}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(path: Path, title: str, text: str) -> None:
    """Write `## title` of a document anew, with how and where; the others stay as they are."""
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    body = f"## {title}\n\n`{_COMMAND}`, {date}, on {machine()}.\n\n{text.strip()}\n"
    old = path.read_text() if path.exists() else "# Reliability, as measured\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    new, found = re.subn(pattern, lambda match: body + "\n", old, flags=re.M | re.S)
    path.write_text((new if found else f"{old}\n{body}").rstrip() + "\n")
