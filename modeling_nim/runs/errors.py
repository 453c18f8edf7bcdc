"""How every script ends: an expected error becomes one line and exit code 2, an unexpected one keeps its traceback."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable

from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm

from ..loading_nim import NO_MEMORY, what_is_wrong


WAIT_FOR_THE_FIRST_S = 5.0
# gloo's and NCCL's words; the process that ended first has the cause
_PEER_IS_GONE = re.compile(r"Connection (closed|reset) by peer|remote process exited|Broken pipe")
_PEER_HAS_ENDED = "another process of this run has ended; its own message says why"


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits. Bad input (`ValueError`, `OSError`, a configuration that its class refuses) and too little
    memory print `error: ...`; `NIM_TRACEBACK=1` shows where."""
    try:
        _exit(main() or 0)
    except (ValueError, OSError, StrictDataclassError, RuntimeError, MemoryError) as error:
        message = _message(error)
        if message is None or os.environ.get("NIM_TRACEBACK"):
            raise
        _leave_it_to_the_first(always=message is _PEER_HAS_ENDED)
        for bar in list(tqdm._instances):
            bar.close()  # or the message would begin at the end of the bar's line
        print(f"error: {message}", file=sys.stderr)
        _exit(1 if message is _PEER_HAS_ENDED else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _message(error: Exception) -> str | None:
    """The message for the user, in one line; None for an unexpected error."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
        return (
            f"the memory is not enough{f' for {asked[1]} more' if asked else ''}; lower the batch size "
            f"(optimization.batch_size, micro_batch), the image size or the model's"
        )
    if isinstance(error, RuntimeError) and not isinstance(error, ValueError):
        return _PEER_HAS_ENDED if _PEER_IS_GONE.search(str(error)) else None
    return " ".join(str(what_is_wrong(error)).split())


def _exit(code: int) -> None:
    """Ends the process; one of several without an orderly shutdown, which would wait for the others."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_it_to_the_first(always: bool = False) -> None:
    """Waits in all processes but the first of a machine, which prints an error that all have; its launcher ends them.

    With `always` the first waits, too. A process that is not ended prints its own message after the wait.
    """
    if always or int(os.environ.get("LOCAL_RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(WAIT_FOR_THE_FIRST_S)
