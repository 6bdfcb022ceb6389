"""Check the whole path in under a minute: train, save, load, decode, verify, evaluate."""

import sys

from recurrent_drafter.cli.endtoend import simple

if __name__ == "__main__":
    sys.exit(simple())
