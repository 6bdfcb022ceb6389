"""The console command ``recurrent-drafter``, and what the root's scripts call: one table, one way to begin.

A command line is parsed and checked before anything heavy loads, so that a wrong flag or path is answered at once. A
command ends with 0, with 2 and one clear line for what the user can mend, or with 130 for an interrupt.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import recurrent_drafter
from recurrent_drafter.cli.options import decoding, measuring, publishing, serving, training
from recurrent_drafter.cli.parser import OptionParser
from recurrent_drafter.reproduce.plan import ReproduceOptions
from recurrent_drafter.training.options import TrainingOptions, check_paths

INTERRUPTED = 130
P = ParamSpec("P")


@dataclass(frozen=True)
class Command:
    """What a command is for, its options, and how it begins: ``read`` and ``check`` raise before ``run`` is loaded.

    ``run`` names a function of `recurrent_drafter.cli`, which takes what ``read`` gives, and ``argv``; it returns the
    exit code.
    """

    what: str
    options: tuple[type, ...]
    run: str
    check: Callable[..., None] = check_paths
    read: Callable[[OptionParser, Sequence[str]], tuple[Any, ...]] = OptionParser.options
    more: str = ""

    def parser(self, prog: str | None = None) -> OptionParser:
        what = f"{self.what[0].upper()}{self.what[1:]}."
        return OptionParser(*self.options, prog=prog, description=what, more=self.more)


COMMANDS = {
    "train": Command(
        "train a drafter, or evaluate one", (TrainingOptions,), "train:run", training.check_train,
        training.read_training,
        "Every flag of transformers' TrainingArguments works too: --help-all adds them, which takes some seconds.",
    ),
    "generate": Command(
        "generate or chat, with or without a drafter",
        (decoding.SpeculatorOptions, decoding.SamplingOptions, decoding.GenerateOptions, decoding.EvaluationOptions),
        "generate:run", decoding.check_generate,
    ),
    "bench": Command(
        "compare ways of decoding on your model: speed, and whether the output is the same",
        (measuring.BenchOptions,), "measuring:bench", measuring.check_bench,
    ),
    "verify": Command(
        "prove that speculation changes no token, on your own model and prompts",
        (decoding.SpeculatorOptions, decoding.SamplingOptions, measuring.PromptOptions, measuring.VerifyOptions),
        "measuring:verify", measuring.check_verify,
    ),
    "tune": Command(
        "find the shape of draft that pays on this machine, and save it beside the drafter",
        (decoding.SpeculatorOptions, measuring.PromptOptions, measuring.TuneOptions),
        "measuring:tune", measuring.check_tune,
    ),
    "reproduce": Command(
        "the paper's comparisons: a grid of trainings and sweeps, and a report",
        (ReproduceOptions,), "reproduce:run", training.check_reproduce,
    ),
    "deploy": Command(
        "publish a drafter on the Hugging Face Hub, with its card and its figures",
        (publishing.DeployOptions,), "publishing:deploy", publishing.check_deploy,
    ),
    "serve": Command(
        "an OpenAI server: vLLM with a drafter", (serving.ServeOptions,), "serve:run", serving.check_serve,
        serving.read_serve, "Flags not listed here go to vLLM as they are.",
    ),
    "convert": Command(
        "rewrite a drafter in another layout: Apple's, or ours with what vLLM and speculators look for",
        (publishing.ConvertOptions,), "publishing:convert", publishing.check_convert,
    ),
    "demo": Command(
        "train a drafter for the bundled model, then compare speed and output",
        (measuring.DemoOptions,), "measuring:demo",
    ),
}  # fmt: skip
SCRIPTS = {
    "show_scope": Command(
        "show which tokens each training scope learns from: the assistant's replies, or the whole conversation",
        (measuring.ConversationOptions,), "conversation:show_scope",
    ),
    "show_targets": Command(
        "make the distilled targets of a conversation for all positions at once, and check each against `generate`",
        (measuring.ConversationOptions, measuring.TargetOptions), "conversation:show_targets",
    ),
    "check": Command(
        "check the whole path in under a minute: train, save, load, decode, verify, evaluate",
        (decoding.VerifierOptions,), "endtoend:simple",
    ),
    "check_all": Command(
        "check the whole path with every method of training, several architectures and a dry run of publishing",
        (decoding.VerifierOptions,), "endtoend:full",
    ),
}  # fmt: skip


def reporting(command: Callable[P, int]) -> Callable[P, int]:
    """Turn what a user can mend into one line on stderr; RECURRENT_DRAFTER_DEBUG=1 shows the traceback instead."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # nobody reads any more: no traceback either when Python flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (ValueError, OSError) as error:
            if os.environ.get("RECURRENT_DRAFTER_DEBUG"):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return run


@reporting
def launch(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command of one of the tables; returns its exit code."""
    command = (COMMANDS | SCRIPTS)[name]
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = command.read(command.parser(prog), arguments)
    command.check(*options)
    module, _, function = command.run.partition(":")
    run = getattr(importlib.import_module(f"recurrent_drafter.cli.{module}"), function)
    quiet()
    return int(run(*options, argv=arguments))


def quiet() -> None:
    """Leave the terminal to us: warnings are plain lines, and transformers gives no advice and shows no bars."""
    from transformers.utils import logging as hf_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        return launch(name, arguments[1:], f"recurrent-drafter {name}")
    table = "\n".join(f"  {name:<10}{command.what}" for name, command in COMMANDS.items())
    if name in ("-h", "--help"):
        print(f"usage: recurrent-drafter COMMAND [flags]\n\n{table}\n\n`recurrent-drafter COMMAND --help`: its flags.")
        return 0
    if name == "--version":
        print(f"recurrent-drafter {recurrent_drafter.__version__}")
        return 0
    print(f"error: unknown command {name!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
