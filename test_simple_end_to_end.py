"""Check the whole path in under a minute: train, save, load, decode, verify, evaluate."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("check"))
