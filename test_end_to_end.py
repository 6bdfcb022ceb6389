"""Check the whole path over methods of training and architectures, in some minutes."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("check_all"))
