"""Commands whose names are settled and whose work is still to come."""

import sys


def not_yet(command: str) -> int:
    """Say on stderr that `command` comes in a later release and what serves until then; returns exit code 2."""
    print(
        f"{command}: not in this release, it comes with a later one; until then train_speculator.py trains a drafter, "
        "generate_speculator.py generates with it, `recurrent-drafter demo` compares both ways of decoding, "
        "and `make test` runs the tests",
        file=sys.stderr,
    )
    return 2
