"""Publish a trained drafter on the Hugging Face Hub; --help lists every flag."""

import sys

from recurrent_drafter.cli.deploy import main

if __name__ == "__main__":
    sys.exit(main())
