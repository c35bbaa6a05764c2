"""The `sela` command: registers the verbs, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from sela_cli import __version__
from sela_cli.commands import (
    embed,
    export,
    export_labels,
    export_logits,
    finetune,
    import_weights,
    info,
    label,
    metrics,
    pack,
    probe,
    report,
    retrain,
    run,
    schedule,
    train,
)
from sela_cli.errors import CannotCreate, NoInput, SelaError, StoppedEarly

EXIT_CODES = """Exit codes: 0 done; 1 training diverged, or nobody reads stdout; 2 usage;
65 bad data; 66 no input; 69 an optional package is missing; 70 out of memory, or a
bug in sela; 73 can't create output; 75 stopped early: run again, or as told; 130 Ctrl-C."""

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


_COMMANDS = (
    *(run, embed, label, train, retrain, probe, finetune, metrics, report),
    *(export_labels, export_logits, export, import_weights, info, schedule, pack),
)
for _module in _COMMANDS:
    _name = _module.__name__.rsplit(".", 1)[-1]
    # `import` is no name that a module can have.
    _verb = getattr(_module, "NAME", _name.replace("_", "-"))
    app.command(_verb, epilog=getattr(_module, "EXAMPLES", None))(getattr(_module, _name))


# What torch's ways between processes say when one of these has gone.
_OF_A_JOB = re.compile("gloo|NCCL|closed by peer|reset by peer")
_PEER_GONE = re.compile("closed by peer|reset by peer|Broken pipe|pair closure|remote process")


def main() -> None:
    """Run the command line; never returns."""
    from sela_cli import interrupt, job

    _open_standard_streams()
    # A crash in a library then says where it was, instead of nothing.
    faulthandler.enable(sys.__stderr__ or sys.stderr)
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if job.number() and verb not in job.VERBS:
        sys.exit(0)
    interrupt.listen()
    # These stop between steps; a signal ends the others where they are.
    polling = verb in (*job.VERBS, "finetune", "pack")
    stopped = StoppedEarly("stopped by a signal", "run it again")
    who = f"sela, process {job.number()}" if job.number() else "sela"
    try:
        with (
            job.joined() if verb in job.VERBS else nullcontext(),
            nullcontext() if polling else interrupt.raising(stopped),
        ):
            app()
    except job.FailedElsewhere as error:
        sys.exit(error.exit_code)
    except SelaError as error:
        if _debug:
            raise
        print(f"{who}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _debug:
            raise
        message, code = _unforeseen(error)
        print(f"{who}: {message}", file=sys.stderr)
        sys.exit(code)


def _open_standard_streams() -> None:
    """Where a daemon's child has none: the first file to be opened would take its place."""
    while True:
        handle = os.open(os.devnull, os.O_RDWR)
        if handle > 2:
            os.close(handle)
            break
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be of the terminal's characters.
        sys.stdout.reconfigure(errors="surrogateescape")


def _unforeseen(error: Exception) -> tuple[str, int]:
    """The line and the exit code for what no stage has a message for."""
    from sela_cli import job

    if job.launched() and isinstance(error, RuntimeError) and _OF_A_JOB.search(str(error)):
        if _PEER_GONE.search(str(error)):
            return "another process of the job has failed", 1
        # Its last line may be empty, after a colon.
        lines = [line for line in str(error).splitlines() if not line.rstrip().endswith(":")]
        return f"the processes of the job can't work together: {' '.join(lines[-1:])}", 1
    # torch's on the CPU, which is a RuntimeError.
    _, allocator, told = str(error).rpartition("DefaultCPUAllocator: ")
    if allocator or isinstance(error, MemoryError):
        return f"out of memory ({told}); use less data, or a machine with more", 70
    # That of its GPUs, by its name: importing torch here would cost every --help a second.
    if type(error).__name__ == "OutOfMemoryError":
        return f"{error}; use --device cpu, or a smaller --batch-size where there is one", 70
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", NoInput.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        _drop_stdout()
        return f"standard output: {error.strerror}", CannotCreate.exit_code
    return f"a bug: {type(error).__name__}: {error}; run `sela --debug ...` for where", 70


def _drop_stdout() -> None:
    """Else the interpreter would try once more to write what has no room, and say so."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
