"""Tries in a child process what might never end, or end the process."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

# A child that waits, for a slow disk perhaps, has shown nothing when this is over.
_PATIENCE = 60


def survives(check: Callable[[], object], seconds: float) -> bool:
    """Whether `check()` neither crashes nor takes more processor time than `seconds`.

    Exceptions of it do not count: they can be handled where they occur. Costs a fork.
    """
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for name in (signal.SIGPROF, signal.SIGALRM):
                signal.signal(name, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.alarm(_PATIENCE)
            check()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGALRM
