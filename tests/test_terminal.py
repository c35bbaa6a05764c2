"""What people see: bars on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from sela_cli import terminal
from sela_cli.images.batches import Images
from sela_cli.images.sources import Source
from sela_cli.terminal import Terminal

STAGE = """
from sela_cli.terminal import Terminal
with Terminal(quiet={quiet}).progress("embed", "images") as progress:
    for done in range(0, 1001, 100):
        progress(done, 1000, "loss 2.5")
"""


def on_a_terminal(code: str, **environment: str) -> str:
    """Everything that Python code writes to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    seen: list[bytes] = []

    def watch() -> None:
        try:
            while part := os.read(leader, 65536):
                seen.append(part)
        except OSError as error:
            # Linux's way to say that the other side is closed.
            assert error.errno == errno.EIO

    watcher = threading.Thread(target=watch)
    watcher.start()
    environment = {"TERM": "xterm", "COLUMNS": "100", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=follower, env={**os.environ, **environment}
    )
    os.close(follower)
    watcher.join()
    os.close(leader)
    assert done.returncode == 0
    return b"".join(seen).decode()


def test_a_bar_tells_count_rate_time_left_and_loss() -> None:
    screen = on_a_terminal(STAGE.format(quiet=False))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen)
    assert "embed" in text and "1000/1000" in text and "loss 2.5" in text
    assert re.search(r"0:00:00 left, \d+ images/s", text)
    # It takes itself away: the last it does is to clear its line.
    assert screen.rstrip().endswith("\x1b[2K")


def test_a_narrow_window_cuts_off_the_count_not_the_loss() -> None:
    text = on_a_terminal(STAGE.format(quiet=False), COLUMNS="50")
    assert "loss 2.5, 0:00:00 left" in text and "…" in text and "/1000" not in text


def test_terminals_that_can_not_move_the_cursor_get_plain_lines() -> None:
    code = "from sela_cli import terminal; terminal._PLAIN_SECONDS = 0.0"
    screen = on_a_terminal(code + STAGE.format(quiet=False), TERM="dumb")
    assert "embed: loss 2.5, " in screen and "\x1b" not in screen


def test_colours_are_left_out_on_request_and_all_when_quiet() -> None:
    assert not re.search(
        r"\x1b\[[0-9;]*3[0-9]", on_a_terminal(STAGE.format(quiet=False), NO_COLOR="1")
    )
    assert on_a_terminal(STAGE.format(quiet=True)) == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by the test."""
    now = [0.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_elsewhere_a_line_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().progress("train", "images") as progress:
        for second in range(0, 91, 10):
            clock[0] = second
            progress(20 * second, 6000, "loss 2.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: loss 2.5, 0:04:30 left, 20 images/s, 600/6000"
    assert lines[2] == "train: loss 2.5, 0:03:30 left, 20 images/s, 1800/6000"
    assert len(lines) == 3


def test_an_open_end_has_no_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().progress("label") as progress:
        clock[0] = 31.0
        progress(12, 0, "residual 1.0e-03")
        clock[0] = 62.0
        progress(0, 0, "5 rows to move")
    assert capsys.readouterr().err.splitlines() == [
        "label: residual 1.0e-03, iteration 12, 0:00:31",
        "label: 5 rows to move, 0:01:02",
    ]


def test_the_rate_is_that_of_now(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal().progress("embed", "images") as progress:
        # An earlier call did 5000; then it slows down, then reports are rare.
        for second, done in ((0, 5000), (30, 5600), (60, 5660), (160, 5700)):
            clock[0] = second
            progress(done, 6000, "")
        # Other images are counted from here on.
        for second, done in ((200, 5), (240, 10)):
            clock[0] = second
            progress(done, 20, "")
    assert capsys.readouterr().err.splitlines() == [
        "embed: 0:00:20 left, 20 images/s, 5600/6000",
        "embed: 0:02:50 left, 2.00 images/s, 5660/6000",
        "embed: 0:12:30 left, 0.40 images/s, 5700/6000",
        "embed: 5/20",
        "embed: 0:01:20 left, 0.12 images/s, 10/20",
    ]


def test_time_left_goes_on_while_nothing_is_reported(clock: list[float]) -> None:
    status = terminal._Status("images")
    for second in (0, 10):
        clock[0] = second
        status.report(10 * second, 400, "")
    clock[0] = 15.0
    assert status.text() == "0:00:25 left, 10 images/s, 100/400"
    clock[0] = 99.0
    assert status.text().startswith("0:00:00 left")


def test_what_is_left_out_of_several_collections_is_told_by_collection_and_counted_in_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `sela probe` has it, of training and of test images."""
    collections = []
    for spec, names in (("one", ["a.png", "b.png"]), ("two", []), ("three", ["c.png"])):
        images = Images(Source(spec, ["d.png"], lambda number: np.zeros(3)), 8, np.arange(1))
        images.left_out = names
        collections.append(images)
    told = Terminal().left_out(*collections)
    assert told == {"left_out": 3, "left_out_images": ["a.png", "b.png", "c.png"]}
    one, three = capsys.readouterr().err.splitlines()
    assert one == "warning: one: 2 of 3 images can't be read, left out: a.png, b.png"
    assert three == "warning: three: 1 of 2 images can't be read, left out: c.png"
