"""`sela info`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.errors import UsageError
from sela_cli.options import Force, Json

EXAMPLES = """Examples: sela info labels.h5 --json.
sela info labels.h5 --plot trace.png"""


def info(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Any file that sela wrote, or '-'.")],
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Of labels: draw the residual of the solve by iteration and time, a PNG. "
            "Needs the extra `report`.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show what a file holds: its kind, digest, origin, datasets and attributes."""
    from sela_cli import extras
    from sela_cli.envelope import describe
    from sela_cli.outputs import check_output
    from sela_cli.terminal import Terminal

    if plot:
        if file == "-":
            raise UsageError("--plot needs a file, not a pipe")
        extras.require("report")
        check_output(plot, force, file)
        from sela_cli.report.figures import write_trace

        write_trace(file, plot, force)
    description = describe(file)
    lines = [
        f"{name:<16} {value}" for name, value in description.items() if not isinstance(value, dict)
    ]
    for section in ("datasets", "attributes"):
        lines.append(f"{section}:")
        lines += [f"  {name:<28} {value}" for name, value in description[section].items()]
    Terminal(as_json=as_json, stdout_taken=plot == "-").result(description, "\n".join(lines))
