"""Check the distilled targets of a model against its own generate, position by position."""

import sys

from recurrent_drafter.cli.later import not_yet

if __name__ == "__main__":
    sys.exit(not_yet("test_distilled_dataset.py"))
