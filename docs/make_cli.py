"""Write docs/cli.md and docs/sela.1 from the help of every command: `make docs`.

A test keeps both current.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from sela_cli import __version__
from sela_cli.cli import EXIT_CODES, app

GROUP: Any = typer.main.get_command(app)
COMMANDS = tuple(GROUP.commands)
FOLDER = Path(__file__).parent


def markdown() -> str:
    """The whole of docs/cli.md."""
    parts = ["# Command line\n\nWritten by `make docs` from the help of each command.\n"]
    for command in ("", *COMMANDS):
        result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0, result.output
        title = f"sela {command}".strip()
        body = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## {title}\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


def manual() -> str:
    """The whole of docs/sela.1, in the man macros."""
    lines = [
        f'.TH SELA 1 "" "sela {__version__}" "User Commands"',
        ".SH NAME",
        rf"sela \- {troff(GROUP.help[0].lower() + GROUP.help[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        ".B sela",
        r"[\fB\-\-debug\fR] \fICOMMAND\fR [\fIOPTION\fR...] [\fIARGUMENT\fR...]",
        ".SH COMMANDS",
    ]
    for name in COMMANDS:
        lines += command(name)
    lines += [".SH EXIT STATUS"]
    for code, meaning in re.findall(r"(\d+) ([^;]+)[;.]", " ".join(EXIT_CODES.split())):
        lines += [".TP", rf"\fB{code}\fR", troff(meaning)]
    lines += [
        ".SH SEE ALSO",
        "Asano, Rupprecht, Vedaldi:",
        ".I Self-labelling via simultaneous clustering and representation learning.",
        "ICLR 2020.",
    ]
    return "\n".join(lines) + "\n"


def command(name: str) -> list[str]:
    """A subsection: what the command does, its arguments and options, its examples."""
    verb = GROUP.commands[name]
    context = typer.Context(verb, info_name=name)
    arguments = [item for item in verb.params if item.param_type_name == "argument"]
    usage = "".join(rf"\fI{troff(item.make_metavar(context))}\fR " for item in arguments)
    lines = [f'.SS "sela {name}"', rf"\fBsela {troff(name)}\fR {usage}[\fIOPTION\fR...]"]
    for paragraph in verb.help.split("\n\n"):
        lines += [".PP", troff(" ".join(paragraph.split()))]
    for item in arguments:
        lines += [".TP", rf"\fI{troff(item.make_metavar(context))}\fR", troff(item.help)]
    for item in verb.params:
        if item not in arguments:
            # An argument has no such record.
            names, text = item.get_help_record(context)
            lines += [".TP", rf"\fB{troff(names)}\fR", troff(" ".join(text.split()))]
    return [*lines, ".PP", troff(" ".join(verb.epilog.split()))]


def troff(text: str) -> str:
    """Plain text for the man macros: no escape, no request, hyphens that can be typed."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


PAGES = {"cli.md": markdown, "sela.1": manual}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (FOLDER / page).write_text(write())
