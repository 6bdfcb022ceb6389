"""Train a drafter for a causal language model: `python train_speculator.py --quick`, or --help for every flag."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("train"))
