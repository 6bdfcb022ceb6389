"""The console command ``recurrent-drafter``: one name in front of every command."""

import importlib
import sys
from collections.abc import Sequence

import recurrent_drafter

COMMANDS = {
    "train": "train a drafter",
    "generate": "generate or chat, with or without a drafter",
    "bench": "compare ways of decoding on your model: speed, and whether the output is the same",
    "verify": "prove that speculation changes no token, on your own model and prompts",
    "tune": "find the shape of draft that pays on this machine, and save it beside the drafter",
    "reproduce": "the paper's comparisons: a grid of trainings and sweeps, and a report",
    "deploy": "publish a drafter on the Hugging Face Hub, with its card and its figures",
    "serve": "an OpenAI server: vLLM with a drafter",
    "convert": "rewrite a drafter in another layout: Apple's, or ours with what vLLM and speculators look for",
    "demo": "train a drafter for the bundled model, then compare speed and output",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        module = importlib.import_module(f"recurrent_drafter.cli.{name}")
        return int(module.main(arguments[1:]))
    listing = "\n".join(f"  {command:<10}{what}" for command, what in COMMANDS.items())
    if name in ("-h", "--help"):
        print(
            f"usage: recurrent-drafter COMMAND [flags]\n\n{listing}\n\n`recurrent-drafter COMMAND --help`: its flags."
        )
        return 0
    if name == "--version":
        print(f"recurrent-drafter {recurrent_drafter.__version__}")
        return 0
    print(f"error: unknown command {name!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
