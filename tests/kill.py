"""Kills commands with SIGKILL, gives each again until it is done, and compares the digests.

    python tests/kill.py --times 20

kills `sela run` at 20 random moments, then the other commands that write files, and
prints a table. With --events the moments are not random: the n-th time that a file is
opened, renamed or removed, for n = 1, 2, 3, ... The exit status is 1 if a digest differs
from that of the same command left alone, or if a killed command left something behind.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import sklearn.datasets  # noqa: F401 (once here, instead of in each child)
import torch._dynamo  # noqa: F401 (the same: an optimizer imports it, which takes 2 s)

from sela_cli import cli, formats, loop, networks, probes, training  # noqa: F401 (the same)

TINY = (
    "--data digits --limit 96 --arch alexnet-small --image-size 16 --batch-size 32 "
    "--device cpu -q --epochs"
)
# Each is given in a folder of its own, beside the files of the commands before it.
COMMANDS = {
    "run": f"run --out run --heads 10x2 --opts 3 {TINY} 2",
    "embed": "embed --data digits --limit 96 --arch alexnet-small --image-size 16 "
    "--heads 10x2 --device cpu -q -o embed.h5",
    "label": "label ../embed.h5 -q -o label.h5",
    "train": f"train --labels ../label.h5 -o train.h5 {TINY} 4",
    "retrain": f"retrain --labels ../label.h5 -o retrain.h5 {TINY} 2",
    "probe": "probe --data digits --limit 96 --checkpoint ../train.h5 --epochs 4 "
    "--device cpu -q -o probe.h5",
}
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


@dataclass
class Ended:
    """A call that is over: its exit status, None if it was killed, and when."""

    code: int | None
    seconds: float


def call(line: str, folder: Path, seconds: float | None = None, event: int = 0) -> Ended:
    """Give a command in a child process, killed after so many seconds or file events."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _command(line, folder, event)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, time.monotonic() - start)


def _command(line: str, folder: Path, event: int) -> NoReturn:
    """The child: `sela` as a process of its own would run it."""
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if event:
            _kill_at(event, str(folder))
        sys.argv = ["sela", *line.split()]
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


def _kill_at(event: int, folder: str) -> None:
    seen = 0

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if name in FILE_EVENTS and str(arguments[0]).startswith((folder, ".", "run")):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def digests(folder: Path) -> dict[str, str]:
    """Payload digests of all files of ours."""
    return {
        path.relative_to(folder).as_posix(): formats.read_header(str(path)).digest
        for path in sorted(folder.rglob("*.h5"))
    }


def leftovers(folder: Path) -> list[str]:
    """What only an unfinished command has."""
    endings = (".partial", ".lock", ".unfinished")
    return [path.name for path in folder.rglob("*") if path.name.endswith(endings)]


def moments(
    line: str, folder: Path, times: int, whole: Ended, rng: random.Random
) -> Iterator[tuple[Path, Ended]]:
    """Give the command and kill it `times` times at random, in a new folder when it is done."""
    place = folder
    number = killed = 0
    while killed < times or not _done(place):
        if _done(place) or number == 0:
            number += 1
            place = folder.with_name(f"{folder.name}-{number}")
            place.mkdir()
        late = rng.uniform(0, whole.seconds) if killed < times else None
        ended = call(line, place, late)
        killed += ended.code is None
        yield place, ended


def events(line: str, folder: Path, times: int) -> Iterator[tuple[Path, Ended]]:
    """Give the command in one folder, killed at its first event, then at its second, ..."""
    folder.mkdir()
    for event in range(1, times + 1):
        ended = call(line, folder, event=event)
        yield folder, ended
        if ended.code is not None:
            return
    yield folder, call(line, folder)


def _done(folder: Path) -> bool:
    return any(folder.glob("*.h5")) or (folder / "run" / "rounds.csv").exists()


def state(folder: Path) -> str:
    """How far a folder has come, in words."""
    names = [path.name for path in folder.rglob("*") if path.is_file() and path.name != "log"]
    labels = sum(name.startswith("labels-0") and name.endswith(".h5") for name in names)
    pieces = [f"{labels} rounds labelled"] if labels else []
    pieces += sorted(name for name in names if name in leftovers(folder))
    return ", ".join(pieces) or "nothing yet"


def main() -> int:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="kills of `run`")
    parser.add_argument("--others", type=int, default=4, help="kills of each other command")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="these commands")
    parser.add_argument("--events", action="store_true", help="at file events, not at random")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    # A few filters are enough; and a training this short would never save its state.
    networks._FILTERS["alexnet-small"] = (4, 6, 6, 6, 4)
    training._SAVE_SECONDS = 0.1
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="sela-kill-") as name:
        root = Path(name)
        for command in arguments.only or COMMANDS:
            line, times = COMMANDS[command], arguments.times
            if command != "run":
                times = arguments.others
            (root / command).mkdir()
            whole = call(line, root / command)
            if whole.code != 0:
                print((root / command / "log").read_text())
                return 1
            wanted = digests(root / command)
            for file in (root / command).glob("*.h5"):
                (root / file.name).write_bytes(file.read_bytes())
            print(f"{command}: {whole.seconds:.1f} s when left alone", flush=True)
            folder = root / f"{command}-killed"
            calls = (
                events(line, folder, times)
                if arguments.events
                else moments(line, folder, times, whole, rng)
            )
            killed = 0
            for place, ended in calls:
                killed += ended.code is None
                if ended.code is None:
                    told = f"killed {killed:>3} after {ended.seconds:5.2f} s: {state(place)}"
                elif not _done(place):
                    told = f"FAILED with exit {ended.code}: {(place / 'log').read_text()[-300:]}"
                    wrong += 1
                else:
                    same = digests(place) == wanted and not leftovers(place)
                    wrong += not same
                    told = f"done with exit {ended.code}: {len(wanted)} digests " + (
                        "are the same" if same else f"DIFFER, {leftovers(place)} left"
                    )
                print(f"  {place.name:<16} {told}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
