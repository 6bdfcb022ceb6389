"""Show which tokens of a conversation each training scope learns from."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("show_scope"))
