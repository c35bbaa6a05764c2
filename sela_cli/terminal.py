"""What the user sees: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

Progress = Callable[[int, int, str], None]
_PLAIN_SECONDS = 30.0


class Terminal:
    """`quiet` leaves only errors and results; `as_json` makes the result one JSON object.

    `stdout_taken`: a file is being written to stdout, so the result goes to stderr.
    """

    def __init__(
        self, quiet: bool = False, as_json: bool = False, stdout_taken: bool = False
    ) -> None:
        self.quiet, self.as_json = quiet, as_json
        self._results = sys.stderr if stdout_taken else sys.stdout

    def say(self, text: str) -> None:
        """A message, to stderr."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def result(self, values: Mapping[str, Any], text: str = "") -> None:
        """The command's result: `values` as JSON with --json, else `text`."""
        if self.as_json:
            print(json.dumps(_finite(values)), file=self._results, flush=True)
        elif text and not (self.quiet and self._results is sys.stderr):
            print(text, file=self._results, flush=True)

    @contextmanager
    def progress(self, title: str, unit: str = "") -> Iterator[Progress]:
        """A callback (done, total, note): a bar on a terminal, else a line every 30 s.

        `unit` is what is counted. A total of 0 is unknown: then no time is left to tell.
        """
        if self.quiet:
            yield lambda done, total, note: None
        elif sys.stderr.isatty():
            with _bar(title, unit) as update:
                yield update
        else:
            yield _lines(title, unit)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    class Status(bars.ProgressColumn):
        def render(self, task: Any) -> Text:
            done, total = int(task.completed), int(task.total or 0)
            elapsed = task.elapsed or 0.0
            text = _status(done, total, unit, task.speed, elapsed, task.fields["note"])
            return Text(text, no_wrap=True, overflow="ellipsis")

    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=12),
        Status(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note: bar.update(
            task, completed=done, total=total or None, note=note
        )


def _lines(title: str, unit: str) -> Progress:
    began = last = time.monotonic()

    def update(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS:
            last = now
            status = _status(done, total, unit, done / (now - began), now - began, note)
            print(f"{title}: {status}", file=sys.stderr, flush=True)

    return update


def _status(
    done: int, total: int, unit: str, speed: float | None, elapsed: float, note: str
) -> str:
    """`384/1797, 410 images/s, 0:00:03 left, loss 2.1`; without a total, what is known."""
    if total:
        parts = [f"{done}/{total}"]
        if speed:
            left = timedelta(seconds=round((total - done) / speed))
            parts += [f"{speed:.0f} {unit}".rstrip() + "/s", f"{left} left"]
    else:
        parts = [f"iteration {done}"] if done else []
        parts.append(str(timedelta(seconds=round(elapsed))))
    return ", ".join(filter(None, [*parts, note]))
