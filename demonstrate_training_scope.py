"""Show which tokens of a conversation each training scope learns from."""

import sys

from recurrent_drafter.cli.show_scope import main

if __name__ == "__main__":
    sys.exit(main())
