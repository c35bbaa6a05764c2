"""Stops commands, gives each again until it is done, and compares the digests.

    python tests/kill.py --output docs/reliability.md

kills `sela run` at 20 random moments and the other commands that write files at a few,
with SIGKILL; then the same with SIGTERM, which they answer. With --events the moments are
random file operations (a file opened, renamed, removed) instead of random times, the same
on every machine. The exit status is 1 if a digest differs from that of the same command
left alone, or if a finished command left something behind.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import record
import sklearn.datasets  # noqa: F401 (once here, instead of in each child)
import torch._dynamo  # noqa: F401 (the same: an optimizer imports it, which takes 2 s)

from sela_cli import cli, envelope, loop, networks, probes, training, unfinished  # noqa: F401 (the same)

TINY = (
    "--data digits --limit 96 --arch alexnet-small --image-size 16 --batch-size 32 "
    "--device cpu -q --epochs"
)
# Each is given in a folder of its own, beside the files of the commands before it.
COMMANDS = {
    "run": f"run --out run --heads 10x2 --opts 3 --precision float32 {TINY} 2",
    "embed": "embed --data digits --limit 96 --arch alexnet-small --image-size 16 "
    "--batch-size 4 --heads 10x2 --device cpu -q -o embed.h5",
    "label": "label ../embed.h5 -q -o label.h5",
    "train": f"train --labels ../label.h5 -o train.h5 {TINY} 4",
    "retrain": f"retrain --labels ../label.h5 -o retrain.h5 {TINY} 2",
    "probe": "probe --data digits --limit 96 --checkpoint ../train.h5 --epochs 4 "
    "--device cpu -q -o probe.h5",
}
# What `sela label` makes of SIGTERM are labels that have not converged, not a state.
STOPPED = [name for name in COMMANDS if name != "label"]
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
# A command that fails again and again would be given for ever.
CALLS = 200


@dataclass
class Ended:
    """A call that is over: its exit status (None: killed), how long it took, its file events."""

    code: int | None
    seconds: float
    events: int

    @property
    def early(self) -> bool:
        """Whether it is to be given again."""
        return self.code in (None, 75)


def call(
    line: str,
    folder: Path,
    number: signal.Signals = signal.SIGKILL,
    seconds: float | None = None,
    event: int = 0,
) -> Ended:
    """Give a command in a child process, sent the signal after so many seconds or file events."""
    start = time.monotonic()
    seen = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        _command(line, folder, number, event, seen)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, number)
    status = os.waitpid(child, 0)[1]
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, time.monotonic() - start, int.from_bytes(seen[:], "little"))


def _command(
    line: str, folder: Path, number: signal.Signals, event: int, seen: mmap.mmap
) -> NoReturn:
    """The child: `sela` as a process of its own would run it."""
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _count(str(folder), number, event, seen)
        sys.argv = ["sela", *line.split()]
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


def _count(folder: str, number: signal.Signals, event: int, seen: mmap.mmap) -> None:
    """Count the file events of this process, and send it the signal before number `event`."""
    process = os.getpid()

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name not in FILE_EVENTS or os.getpid() != process:
            return
        if str(arguments[0]).startswith((folder, ".", "run")):
            count = int.from_bytes(seen[:], "little") + 1
            seen[:] = count.to_bytes(8, "little")
            if count == event:
                os.kill(process, number)

    sys.addaudithook(hook)


def digests(folder: Path) -> dict[str, str]:
    """Payload digests of all files of ours."""
    return {
        path.relative_to(folder).as_posix(): envelope.read_header(str(path)).digest
        for path in sorted(folder.rglob("*.h5"))
    }


def leftovers(folder: Path) -> list[str]:
    """What only an unfinished command has."""
    endings = (".partial", ".lock", ".unfinished")
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith(endings))


def done(folder: Path) -> bool:
    """Whether the command has written all that it is to write."""
    return any(folder.glob("*.h5")) or (folder / "run" / "rounds.csv").exists()


def state(folder: Path) -> str:
    """How far a folder has come, in words."""
    if done(folder):
        return "all of it"
    names = [path.name for path in folder.rglob("*") if path.is_file() and path.name != "log"]
    labels = sum(name.startswith("labels-0") and name.endswith(".h5") for name in names)
    pieces = [f"{labels} rounds labelled"] if labels else []
    return ", ".join(pieces + leftovers(folder)) or "nothing"


@dataclass
class Kills:
    """A command that is stopped again and again, and what it ended with."""

    command: str
    line: str
    root: Path
    whole: Ended
    wanted: dict[str, str]
    number: signal.Signals
    by_events: bool
    rng: random.Random
    wrong: int = 0
    stopped: int = 0
    rows: list[list[object]] = field(default_factory=list)

    def stop(self, times: int) -> Iterator[str]:
        """Give it until it was stopped so often and is done; a line for each call.

        In a new folder whenever it is done before.
        """
        folder, waiting = self._folder(0), 0
        for turn in range(CALLS):
            # Of what is done already there may be no time left to stop it in.
            late = self.rng.uniform(0, 1) if self.stopped < times else None
            ended = self._call(folder, late)
            self.stopped += ended.early
            if ended.early:
                when = f"event {ended.events}" if self.by_events else f"{ended.seconds:.2f} s"
                self.rows.append([self.command, when, state(folder), ""])
                waiting += 1
                yield f"stopped {self.stopped:>3} at {when}: {state(folder)}"
            if not done(folder):
                if not ended.early:
                    self.wrong += 1
                    log = (folder / "log").read_text()
                    yield f"FAILED with exit {ended.code}: {log[-300:]}"
                continue
            told = self._compare(folder, whole=not ended.early)
            for row in self.rows[len(self.rows) - waiting :]:
                row[-1] = told
            yield f"exit {ended.code}: {told}"
            if self.stopped >= times:
                return
            folder, waiting = self._folder(turn + 1), 0
        self.wrong += 1
        yield f"not done after {CALLS} calls"

    def _call(self, folder: Path, late: float | None) -> Ended:
        if late is None:
            return call(self.line, folder)
        if self.by_events:
            event = 1 + int(late * self.whole.events)
            return call(self.line, folder, self.number, event=event)
        return call(self.line, folder, self.number, seconds=late * self.whole.seconds)

    def _folder(self, turn: int) -> Path:
        folder = self.root / f"{self.command}-{self.number.name}-{turn}"
        folder.mkdir()
        return folder

    def _compare(self, folder: Path, whole: bool) -> str:
        # One killed after its last file was there had no time to tidy up.
        left = leftovers(folder) if whole else []
        same = digests(folder) == self.wanted and not left
        self.wrong += not same
        count = f"{len(self.wanted)} digest{'s' * (len(self.wanted) > 1)}"
        return f"the same {count}" if same else f"DIFFERS in {count}, {left} left"


TEXT = """Each command is given in a folder and stopped at a random {moment}; what it has left is
listed. Then the same command is given again, perhaps stopped again, until it is done, and the
payload digests of all its files are compared with those of the command left alone. Networks
are tiny, and training saves its state after every step instead of every five minutes. Nothing
else may be left when a command is done."""


def _record(arguments: argparse.Namespace, rows: dict[signal.Signals, list[list[object]]]) -> None:
    moment = "file operation" if arguments.events else "time"
    text = TEXT.format(moment=moment) + f" Seed {arguments.seed}."
    for number, table in rows.items():
        text += f"\n\n{number.name}, {len(table)} times:\n\n"
        text += record.table(["command", "after", "left", "in the end"], table)
    record.section(arguments.output, "Kills", text)


def main() -> int:
    """Stop the commands, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="SIGKILLs of `run`")
    parser.add_argument("--others", type=int, default=5, help="of each other command and signal")
    parser.add_argument("--only", choices=COMMANDS, action="append", help="these commands")
    parser.add_argument("--events", action="store_true", help="at file operations, not at times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="document that the table is recorded in")
    arguments = parser.parse_args()
    # A few filters are enough; and a training this short would never save its state.
    networks._FILTERS["alexnet-small"] = (4, 6, 6, 6, 4)
    unfinished._SAVE_SECONDS = 0.0
    rows: dict[signal.Signals, list[list[object]]] = {signal.SIGKILL: [], signal.SIGTERM: []}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="sela-kill-") as name:
        root = Path(name)
        for command in arguments.only or COMMANDS:
            line = COMMANDS[command]
            (root / command).mkdir()
            whole = call(line, root / command)
            if whole.code != 0:
                print((root / command / "log").read_text())
                return 1
            for file in (root / command).glob("*.h5"):
                (root / file.name).write_bytes(file.read_bytes())
            print(f"{command}: {whole.seconds:.1f} s, {whole.events} file events", flush=True)
            for number, table in rows.items():
                if number is signal.SIGTERM and command not in STOPPED:
                    continue
                # Its file operations come before the first batch, and after the last.
                if number is signal.SIGTERM and command == "embed" and arguments.events:
                    continue
                wanted, rng = digests(root / command), random.Random(arguments.seed)
                kills = Kills(command, line, root, whole, wanted, number, arguments.events, rng)
                most = command == "run" and number is signal.SIGKILL
                times = arguments.times if most else arguments.others
                for told in kills.stop(times):
                    print(f"  {number.name} {told}", flush=True)
                table += kills.rows
                wrong += kills.wrong
            # After each command: what is measured is there, whatever becomes of the rest.
            if arguments.output:
                _record(arguments, rows)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
