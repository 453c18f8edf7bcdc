"""What a script does before its imports, which take seconds: a signal in that time ends the run well, too.

It imports the standard library alone. A training script handles signals itself from its loop on
(`modeling_nim.training.progress.StopSignal`); attacks and certificates write each batch when it is done, so they may
end at any moment.
"""

import ctypes
import os
import signal
import sys


STOPPED = "stopped by {}; the same command goes on from what is written"
_PR_SET_PDEATHSIG = 1


def watch_signals() -> None:
    """SIGTERM ends the process with one line and exit code 0, SIGINT with 130; so does the end of its launcher.

    A rank among several ends without a line: it may wait for another rank in native code, where Python handles no
    signal. Its launcher says the line (`launch.py`).
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if "RANK" in os.environ else _end)
    # set for the processes that `accelerate launch`, `launch.py` and torchrun start
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if _launcher_is_gone():
            os.kill(os.getpid(), signal.SIGTERM)


def _launcher_is_gone() -> bool:
    """Whether the launcher ended before it could be watched.

    Started by it, this process is of its process group; the parent that took its place (init) is of another. A process
    that leads its own group is not judged.
    """
    group = os.getpgrp()
    return group != os.getpid() and os.getpgid(os.getppid()) != group


def exit_code_of(number: int) -> int:
    """A preempted node (SIGTERM) ended well; Ctrl-C is 130 as in every shell."""
    return 130 if number == signal.SIGINT else 0


def _end(number: int, _) -> None:
    print(STOPPED.format(signal.Signals(number).name), file=sys.stderr, flush=True)
    os._exit(exit_code_of(number))  # no exception: some import would catch it
