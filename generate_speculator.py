"""Generate with a model and its drafter: one prompt, a chat or a benchmark; --help lists every flag."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("generate"))
