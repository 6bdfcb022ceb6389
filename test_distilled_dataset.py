"""Show a conversation's distilled targets, position by position, and check them against the model's own generate."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("show_targets"))
