"""Publish a trained drafter on the Hugging Face Hub; --help lists every flag."""

import sys

from recurrent_drafter.cli.main import launch

if __name__ == "__main__":
    sys.exit(launch("deploy"))
