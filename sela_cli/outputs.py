"""Files that are written whole or not at all, and checked before any work is done."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sela_cli.errors import BadData, CannotCreate, UsageError
from sela_cli.locks import locked

# Bytes of a file's name that file systems take.
_LONGEST_NAME = 255


def same_file(path: str, other: str) -> bool:
    """Whether both name one file, there or not."""
    return os.path.realpath(path) == os.path.realpath(other)


def check_output(path: str, force: bool, *inputs: str | None) -> None:
    """Refuse, before any work is done, an output that could not be written.

    Raises CannotCreate where it exists and `force` is off, its name is too long, or its
    folder is missing; UsageError where it is one of the `inputs` (FILE or FILE::NAME).
    """
    if path == "-":
        return
    if any(each and same_file(path, each.partition("::")[0]) for each in inputs):
        raise UsageError(f"{path} would take the place of what is read", "name another output")
    # Before a link is followed: /dev/stdout may lead to a pipe, which has no name.
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise CannotCreate(f"{path} is {kind}", "name a file, or - for standard output")
    # Of a link, the file that it leads to is replaced.
    target = Path(os.path.realpath(path) if os.path.islink(path) else path)
    # What lies beside it meanwhile has a longer name.
    if len(os.fsencode(f"{target.name}.unfinished")) > _LONGEST_NAME:
        raise CannotCreate(f"{path}: its name is too long", "choose a shorter one")
    if target.exists() and not force:
        raise CannotCreate(f"{path} exists", "add --force to replace it")
    if not target.parent.is_dir():
        raise CannotCreate(f"{path}: no such folder", f"mkdir -p {shlex.quote(str(target.parent))}")
    if not os.access(target.parent, os.W_OK):
        raise CannotCreate(f"{path}: its folder is read-only", "choose another --output")


def check_outside(folder: str, images: str) -> None:
    """Raises UsageError where files in `folder` would be images of the folder `images`."""
    if Path(folder).resolve().is_relative_to(Path(images).resolve()):
        raise UsageError(f"{folder} is in {images}", f"name a folder outside of {images}")


@contextmanager
def replacing(path: str, force: bool = False) -> Iterator[Path]:
    """Write a file whole or not at all: yields where to write, then moves it to `path`.

    `-` sends it to standard output instead. Raises CannotCreate, also where another
    process is writing that file.
    """
    check_output(path, force)
    try:
        with _written_to_stdout() if path == "-" else _written_beside(path) as partial:
            yield partial
    except BrokenPipeError:
        raise
    except OSError as error:
        mend = "free space, or write elsewhere"
        if path == "-":
            mend += "; it is written to a file in TMPDIR first"
        raise CannotCreate(f"{path}: {reason(error)}", mend) from error


@contextmanager
def _written_beside(path: str) -> Iterator[Path]:
    # Of a link, the file that it leads to is replaced.
    target = Path(path).resolve()
    partial, lock = _partial_and_lock(target)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError:
            raise CannotCreate(
                f"{path}: another process is writing it", "wait for it, or choose another name"
            ) from None
        stack.callback(partial.unlink, missing_ok=True)
        yield partial
        synced(partial)
        os.replace(partial, target)
        synced(target.parent)


def _partial_and_lock(target: Path) -> tuple[Path, Path]:
    """Where a file is written before it has its name, and the lock that is held meanwhile."""
    # One name for all processes: what a killed one left behind, the next one overwrites.
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.lock")


def discard(path: Path) -> None:
    """Remove a file, and what a process that was killed while writing it left behind."""
    partial, lock = _partial_and_lock(path)
    # Where another process is writing it, it is that one's.
    with suppress(BlockingIOError), locked(lock):
        partial.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


@contextmanager
def _written_to_stdout() -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix="sela-stdout-")
    os.close(handle)
    try:
        yield Path(name)
        with Path(name).open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def removable(path: Path) -> Iterator[None]:
    """BadData in this block, which reads what stopped work left, is mended by removing that."""
    try:
        yield
    except BadData as error:
        raise BadData(error.args[0], f"rm {shlex.quote(str(path))}") from error


def synced(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: OSError) -> str:
    """What went wrong, without numbers and paths."""
    return os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
