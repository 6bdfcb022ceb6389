"""Show which tokens of a conversation each training scope learns from."""

import sys

from recurrent_drafter.cli.later import not_yet

if __name__ == "__main__":
    sys.exit(not_yet("demonstrate_training_scope.py"))
