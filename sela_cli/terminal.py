"""What the user sees: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sela_cli.progress import Progress, silent

if TYPE_CHECKING:
    from sela_cli.images.batches import Images
    from sela_cli.images.sources import Source
    from sela_cli.training import Training

_PLAIN_SECONDS = 30.0
# The rate is that of the last so many seconds.
_RATE_SECONDS = 30.0
# Of a list of names so many are said.
_NAMES = 5


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

    def left_out(self, *collections: Images) -> dict[str, Any]:
        """Say which of the images asked for --skip-bad has left out; for the result too.

        Also say how many pictures of which kinds are not read at all.
        """
        for images in collections:
            unread, names = images.source.unread, images.left_out
            if unread:
                kinds = ", ".join(f"{kind} ({unread[kind]})" for kind in sorted(unread))
                self.say(f"warning: {images.spec}: left out what is not read: {kinds}")
            if names:
                asked = len(images) + len(names)
                told = f"{len(names)} of {asked} images can't be read, left out"
                if not self.as_json:
                    # Else the result has all of them.
                    told += f": {_first(names)}"
                self.say(f"warning: {images.spec}: {told}")
        left_out = [name for images in collections for name in images.left_out]
        return {"left_out": len(left_out), "left_out_images": left_out}

    def warn_if_same(self, trained: Source, tested: Source) -> None:
        """Say so where the test images are those of the training."""
        if trained.is_like(tested):
            self.say(f"warning: {tested.spec}: trained and tested on the same images")

    def result(self, values: Mapping[str, Any], text: str = "") -> None:
        """The command's result: `values` as JSON with --json, else `text`."""
        if self.as_json:
            print(json.dumps(_finite(values)), file=self._results, flush=True)
        elif text and not (self.quiet and self._results is sys.stderr):
            print(text, file=self._results, flush=True)

    def train(self, training: Training, device: str, dry_run: bool) -> None:
        """Train and say what came of it, or only what would be done."""
        shown = training.plan() | self.left_out(training.images)
        steps = f"steps {shown['from_step']}..{shown['to_step']} of {training.network.arch}"
        if dry_run:
            settings = "\n".join(f"{name} = {value}" for name, value in shown["recipe"].items())
            self.result(shown, f"would write {training.output}: {steps}\n{settings}")
            return
        with self.progress("train", "images") as progress:
            trained = training.run(device, progress)
        loss = float(trained.losses[-1]) if len(trained.losses) else float("nan")
        self.result(shown | {"loss": loss}, f"wrote {training.output}: {steps}, loss {loss:.3f}")

    @contextmanager
    def progress(self, title: str, unit: str = "") -> Iterator[Progress]:
        """A callback (done, total, note): a bar on a terminal, else a line every 30 s.

        `unit` is what is counted; without one no rate is shown. A total of 0 is unknown:
        then no time is left to tell.
        """
        if self.quiet:
            yield silent
        elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            with _bar(title, unit) as update:
                yield update
        else:
            yield _lines(title, unit)


def _first(names: list[str]) -> str:
    more = len(names) - _NAMES
    shown = ", ".join(names[:_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _Status:
    """What is known of a stage, and the most important of it first: lines may be cut off."""

    def __init__(self, unit: str) -> None:
        self._unit, self._began = unit, time.monotonic()
        self._done, self._total, self._note = 0, 0, ""
        self._reports: deque[tuple[float, int]] = deque()
        self._speed, self._reported = 0.0, 0.0

    def report(self, done: int, total: int, note: str) -> None:
        """Of the rate only growth tells: an earlier call may have done what is done at first."""
        now = time.monotonic()
        if total != self._total or done < self._done:
            # Something else is counted.
            self._reports.clear()
        self._reports.append((now, done))
        # Two at least, however slow they come.
        while len(self._reports) > 2 and now - self._reports[1][0] >= _RATE_SECONDS:
            self._reports.popleft()
        began, first = self._reports[0]
        self._speed = (done - first) / (now - began) if now > began else 0.0
        self._done, self._total, self._note, self._reported = done, total, note, now

    def text(self) -> str:
        """`loss 2.1, 0:00:03 left, 410 images/s, 384/1797`; without a total, what is known."""
        now, done, speed = time.monotonic(), self._done, self._speed
        parts = [self._note]
        if self._total:
            if speed:
                # Time goes on where reports are slow to come.
                left = (self._total - done) / speed - (now - self._reported)
                parts.append(f"{timedelta(seconds=max(0, round(left)))} left")
                if self._unit:
                    parts.append(f"{speed:.{0 if speed >= 10 else 2}f} {self._unit}/s")
            parts.append(f"{done}/{self._total}")
        else:
            parts.append(f"iteration {done}" if done else "")
            parts.append(f"{timedelta(seconds=round(now - self._began))}")
        return ", ".join(filter(None, parts))


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    status = _Status(unit)

    class Column(bars.ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(status.text(), no_wrap=True, overflow="ellipsis")

    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=12),
        Column(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int, note: str) -> None:
            status.report(done, total, note)
            bar.update(task, completed=done, total=total or None)

        yield update


def _lines(title: str, unit: str) -> Progress:
    status, last = _Status(unit), time.monotonic()

    def update(done: int, total: int, note: str) -> None:
        nonlocal last
        status.report(done, total, note)
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS:
            last = now
            print(f"{title}: {status.text()}", file=sys.stderr, flush=True)

    return update
