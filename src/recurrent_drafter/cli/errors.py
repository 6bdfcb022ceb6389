"""How a command ends: 0 done, 2 with one clear line for what the user can mend, 130 for an interrupt."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

INTERRUPTED = 130


class _OneLineParser(HfArgumentParser):
    def add_argument(self, *names: str, **options: Any) -> Any:
        """A field whose metadata has ``positional`` is told by its place and not by a flag."""
        if options.pop("positional", False):
            del options["required"]  # which argparse says itself of places
            names = (names[0].removeprefix("--"),)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the flags)")


def parse(argv: Sequence[str] | None, description: str, *kinds: Any) -> tuple[Any, ...]:
    """One instance of each dataclass from the command line. Raises ValueError for flags that do not exist or fit."""
    options, unknown = parse_known(argv, description, *kinds)
    if unknown:
        name = unknown[0].split("=")[0]  # what stands behind it may be a token
        raise ValueError(f"unknown argument {name} (--help lists the flags)")
    return options


def parse_known(argv: Sequence[str] | None, description: str, *kinds: Any) -> tuple[tuple[Any, ...], list[str]]:
    """As `parse`, and the words that belong to none of these flags, in their order."""
    parser = _OneLineParser(list(kinds), description=description, allow_abbrev=False)
    *options, unknown = parser.parse_args_into_dataclasses(
        list(argv) if argv is not None else None, return_remaining_strings=True, look_for_args_file=False
    )
    return tuple(options), unknown


def reporting(command: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Turn what a user can mend into one line on stderr; RECURRENT_DRAFTER_DEBUG=1 shows the traceback instead."""

    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return command(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except (ValueError, OSError) as error:
            if os.environ.get("RECURRENT_DRAFTER_DEBUG"):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    run.__doc__ = command.__doc__
    return run
