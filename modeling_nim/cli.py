"""How every script ends: an expected error becomes one line and exit code 2, an unexpected one keeps its traceback."""

import os
import sys
from collections.abc import Callable


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits. Bad input (`ValueError`, `OSError`) prints `error: ...`; `NIM_TRACEBACK=1` shows where."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        if os.environ.get("NIM_TRACEBACK"):
            raise
        # strict dataclasses wrap the message of a validator; its first cause says what is wrong
        while error.__cause__ is not None and isinstance(error.__cause__, (ValueError, TypeError)):
            error = error.__cause__
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
