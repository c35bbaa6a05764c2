"""examples/slurm_requeue.sh, with a stand-in for the scheduler: stopped, queued again, gone on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from sela_cli import cli, envelope

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm_requeue.sh"
WORDS = (
    "--data digits --limit 48 --arch alexnet-small --image-size 16 --heads 4 --epochs 2 "
    "--opts 2 --batch-size 16 --precision float32 --device cpu --quiet"
)
OPTIONS = WORDS.split()

# `sela`, but for the scheduler's signal: it comes to the batch shell once the labels of the
# round that JOB names are there, and the command waits until the shell has passed it on.
SELA = """#!{python}
import os, signal, sys
sys.path.insert(0, {root!r})
job = int(os.environ["JOB"])

def signalled(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(f"labels-00{{job}}.h5"):
        os.kill(os.getppid(), (signal.SIGUSR1, signal.SIGTERM)[job % 2])
        while not interrupt.requested():
            os.sched_yield()

from sela_cli import interrupt
from sela_cli.cli import main
if job < 2:
    sys.addaudithook(signalled)
main()
"""
SCONTROL = """#!/bin/sh
test "$1" = requeue && echo "$2" >> "$QUEUE"
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def submit(folder: Path) -> list[int]:
    """Give the script to the scheduler; exit codes of the jobs until it is not queued again."""
    queue = folder / "queue"
    queue.touch()
    codes: list[int] = []
    while queue.read_text().split() == ["17"] * len(codes):
        done = subprocess.run(
            ["bash", SCRIPT, *OPTIONS, "--out", "stopped"],
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                "SLURM_JOB_ID": "17",
                "QUEUE": str(queue),
                "JOB": str(len(codes)),
            },
            capture_output=True,
            timeout=300,
        )
        assert done.returncode in (0, 75), done.stderr.decode()
        codes.append(done.returncode)
    return codes


def digests(folder: Path) -> dict[str, str]:
    return {path.name: envelope.read_header(str(path)).digest for path in folder.glob("*.h5")}


@pytest.mark.slow
def test_a_job_that_is_signalled_is_queued_again_and_ends_with_the_same_digests(
    tmp_path: Path,
) -> None:
    program(tmp_path / "sela", SELA.format(python=sys.executable, root=str(ROOT)))
    program(tmp_path / "scontrol", SCONTROL)
    # SIGUSR1 after the labels of round 0, SIGTERM after those of round 1.
    assert submit(tmp_path) == [75, 75, 0]
    with (
        mock.patch.object(sys, "argv", ["sela", "run", *OPTIONS, "--out", str(tmp_path / "whole")]),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert ended.value.code == 0
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_the_scheduler_is_told_to_signal_the_shell_and_to_queue_again() -> None:
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", SCRIPT.read_text(), re.MULTILINE))
    assert directives["signal"].startswith("B:USR1@") and "requeue" in directives
    # Else the second job would wipe out what the first one told.
    assert directives["open-mode"] == "append"
