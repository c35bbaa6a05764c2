"""The `sela` command: registers the verbs, and turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sela_cli import __version__
from sela_cli.commands import (
    embed,
    export_labels,
    export_logits,
    info,
    label,
    metrics,
    probe,
    report,
    retrain,
    run,
    schedule,
    train,
)
from sela_cli.errors import SelaError

EXIT_CODES = """Exit codes: 0 done; 1 training diverged, or nobody reads stdout; 2 usage;
65 bad data; 66 no input; 69 an optional package is missing; 70 a bug in sela; 73 can't
create output; 75 stopped early, state saved: run again; 130 Ctrl-C."""

app = typer.Typer(
    name="sela",
    help="Label every image of an unlabelled collection, and learn the network that does it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    # Plain help: rich's costs 0.1 s at each start. Errors are handled below.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sela {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    global _debug
    _debug = debug


for _module in (
    run,
    embed,
    label,
    train,
    retrain,
    probe,
    metrics,
    report,
    export_labels,
    export_logits,
    info,
    schedule,
):
    _name = _module.__name__.rsplit(".", 1)[-1]
    app.command(_name.replace("_", "-"), epilog=getattr(_module, "EXAMPLES", None))(
        getattr(_module, _name)
    )


def main() -> None:
    """Run the command line; never returns."""
    from sela_cli import interrupt

    interrupt.listen()
    try:
        app()
    except SelaError as error:
        if _debug:
            raise
        print(f"sela: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _debug:
            raise
        print(
            f"sela: a bug: {type(error).__name__}: {error}; run `sela --debug ...` for where",
            file=sys.stderr,
        )
        sys.exit(70)
