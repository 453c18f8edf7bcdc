"""How every script ends: an expected error becomes one line and exit code 2, an unexpected one keeps its traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits. Bad input (`ValueError`, `OSError`, a configuration that its class refuses) prints
    `error: ...`; `NIM_TRACEBACK=1` shows where."""
    try:
        sys.exit(main())
    except (ValueError, OSError, StrictDataclassError) as error:
        if os.environ.get("NIM_TRACEBACK"):
            raise
        # strict dataclasses wrap the message of a validator; the cause says what is wrong
        while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
            error = error.__cause__
        for bar in list(tqdm._instances):
            bar.close()  # or the message would begin at the end of the bar's line
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def naming_damaged_weights(path: str | os.PathLike) -> Iterator[None]:
    """Says which model's weights cannot be read, which safetensors does not."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {str(path)!r} are damaged ({error}); make or download them again") from error
