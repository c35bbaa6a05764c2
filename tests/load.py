"""Many readers of one file, and many files in one folder, measured.

    python tests/load.py --output docs/reliability.md

The exit status is 1 if a reader fails or sees something else than the others.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import fuzz
import record

from sela_cli import cli
from sela_cli.images.sources import open_source

# What ext4 gives one file is 65,000 names.
_LINKS = 50_000


def _child(work: Callable[[], object], output: Path, go: int) -> NoReturn:
    """A child process: does `work` when `go` is at its end, its streams in `output`."""
    code = 70
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        # Of its own, whatever a test runner has put in their place.
        sys.stdout = sys.stderr = os.fdopen(log, "w")
        os.read(go, 1)
        work()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def readers(count: int, folder: Path) -> tuple[float, set[str], set[int]]:
    """So many `sela info` on one file at once: seconds, and the outputs and exit codes seen."""
    _, make, _ = fuzz.FORMATS["labels"]
    make(folder / "labels.h5")
    sys.argv = ["sela", "info", str(folder / "labels.h5"), "--json"]
    waits, opens = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(opens)
            _child(cli.main, folder / f"{number}.out", waits)
        children.append(child)
    began = time.monotonic()
    os.close(opens)
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    seconds = time.monotonic() - began
    os.close(waits)
    seen = {(folder / f"{number}.out").read_text() for number in range(count)}
    return seconds, seen, codes


def listing(count: int, folder: Path) -> tuple[float, float, float]:
    """A folder of so many images listed: seconds, and megabytes before and at most."""
    _, make, _ = fuzz.FORMATS["png"]
    photos = folder / "photos"
    photos.mkdir()
    for number in range(count):
        if number % _LINKS == 0:
            original = folder / f"{number}.png"
            make(original)
        os.link(original, photos / f"{number:07d}.png")
    result = folder / "result"

    def listed() -> None:
        # The peak starts anew with the process that measures.
        Path("/proc/self/clear_refs").write_text("5")
        before, began = _peak(), time.monotonic()
        assert len(open_source(str(photos))) == count
        print(time.monotonic() - began, before, _peak())

    child = os.fork()
    if child == 0:
        _child(listed, result, os.open(os.devnull, os.O_RDONLY))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, result.read_text()
    seconds, before, peak = map(float, result.read_text().split())
    return seconds, before, peak


def _peak() -> float:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


def main() -> int:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=100)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the files are made, such as /dev/shm")
    parser.add_argument("--output", type=Path, help="document that the result is recorded in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sela-load-", dir=arguments.folder) as name:
        (Path(name) / "readers").mkdir()
        took, seen, codes = readers(arguments.readers, Path(name) / "readers")
        seconds, before, peak = listing(arguments.files, Path(name))
        fine = len(seen) == 1 and codes == {0}
        text = (
            f"{arguments.readers} `sela info` on one file, forked and let go at the same moment: "
            f"exit codes {sorted(codes)}, {len(seen)} different output, {took:.1f} s in all.\n\n"
            f"A folder of {arguments.files:,} small images, listed as `--data` lists it: "
            f"{seconds:.1f} s; the process had {before:.0f} MB before and {peak:.0f} MB at most "
            f"(VmHWM), {1e6 * (peak - before) / arguments.files:.0f} bytes an image, which is its "
            "name. Reading a folder keeps nothing else of it."
        )
        print(text)
        if arguments.output:
            record.section(arguments.output, "Load", text)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
