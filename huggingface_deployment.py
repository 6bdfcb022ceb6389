"""Publish a trained drafter on the Hugging Face Hub."""

import sys

from recurrent_drafter.cli.later import not_yet

if __name__ == "__main__":
    sys.exit(not_yet("huggingface_deployment.py"))
