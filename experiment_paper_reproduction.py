"""Reproduce the paper's comparisons of training methods, scopes and datasets."""

import sys

from recurrent_drafter.cli.later import not_yet

if __name__ == "__main__":
    sys.exit(not_yet("experiment_paper_reproduction.py"))
