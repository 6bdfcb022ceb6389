"""Reproduce the paper's comparisons: `python experiment_paper_reproduction.py --quick`, or --help for every flag."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("reproduce"))
