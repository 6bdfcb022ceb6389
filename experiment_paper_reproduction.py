"""Reproduce the paper's comparisons: `python experiment_paper_reproduction.py --quick`, or --help for every flag."""

import sys

from recurrent_drafter.cli.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
