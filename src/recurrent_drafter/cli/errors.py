"""How a command ends: 0 done, 2 with one clear line for what the user can mend, 130 for an interrupt."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

INTERRUPTED = 130
P = ParamSpec("P")


def reporting(command: Callable[P, int]) -> Callable[P, int]:
    """Turn what a user can mend into one line on stderr; RECURRENT_DRAFTER_DEBUG=1 shows the traceback instead."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except (ValueError, OSError) as error:
            if os.environ.get("RECURRENT_DRAFTER_DEBUG"):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return run
