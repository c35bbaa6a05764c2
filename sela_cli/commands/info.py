"""`sela info`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import Json

EXAMPLES = "Example: sela info labels.h5 --json"


def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Any file that sela wrote, or '-'.")],
    as_json: Json = False,
) -> None:
    """Show what a file holds: its kind, digest, origin, datasets and attributes."""
    from sela_cli.formats import describe
    from sela_cli.terminal import Terminal

    description = describe(file)
    lines = [
        f"{name:<16} {value}" for name, value in description.items() if not isinstance(value, dict)
    ]
    for section in ("datasets", "attributes"):
        lines.append(f"{section}:")
        lines += [f"  {name:<28} {value}" for name, value in description[section].items()]
    Terminal(as_json=as_json).result(description, "\n".join(lines))
