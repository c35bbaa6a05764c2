"""`sela info`."""

from __future__ import annotations

from typing import Annotated, Any

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
    """Show what a file holds: its kind, origin, parameters, datasets and attributes.

    Of labels also what `sela label` says of each head.
    """
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
    description = describe(file, _heads)
    sections = ("parameters", "datasets", "attributes")
    lines = [
        f"{name:<16} {value}"
        for name, value in description.items()
        if name not in ("heads", *sections)
    ]
    if "heads" in description:
        from sela_cli.metrics import certificate_lines

        lines += certificate_lines(description["heads"])
    for section in sections:
        lines.append(f"{section}:")
        lines += [f"  {name:<28} {value}" for name, value in description[section].items()]
    Terminal(as_json=as_json, stdout_taken=plot == "-").result(description, "\n".join(lines))


def _heads(path: str, file: Any, header: Any) -> dict[str, Any]:
    """Of labels what `sela label` says of each head."""
    if header.kind != "labels":
        return {}
    # SciPy takes longer to start than all that other files need.
    from sela_cli.formats import labels_of
    from sela_cli.metrics import certificate

    return {"heads": [certificate(head) for head in labels_of(path, file, header).heads]}
