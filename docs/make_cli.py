"""Write docs/cli.md from the help of every command: `make docs`. A test keeps it current."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from sela_cli.cli import app

COMMANDS = tuple(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TARGET = Path(__file__).with_name("cli.md")


def text() -> str:
    """The whole page."""
    parts = ["# Command line\n\nWritten by `make docs` from the help of each command.\n"]
    for command in ("", *COMMANDS):
        result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        title = f"sela {command}".strip()
        body = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## {title}\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(text())
