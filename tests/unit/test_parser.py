"""Fields become flags, and what they say becomes the fields' values."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers import HfArgumentParser
from transformers import TrainingArguments as Inherited

from recurrent_drafter.cli.parser import OptionParser
from recurrent_drafter.training.options import option


@dataclass
class Options:
    source: str = option(..., "a place", positional="SOURCE")
    needed: str = option(..., "must be given", aliases=["--also"])
    max_steps: int = option(3, "a number")
    rate: float | None = option(None, "another")
    kind: Literal["one", "two"] | None = option(None, "a choice")
    shown: bool = option(False, "off unless asked")
    kept: bool = option(True, "on unless refused")
    names: list[str] = option(["a"], "some")
    hidden: int = field(default=0, init=False)


def parsed(words: str) -> Options:
    (options,) = OptionParser(Options).options(f"here --needed x {words}".split())
    return options


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("", "source", "here"),
        ("", "max_steps", 3),
        ("", "names", ["a"]),
        ("--also y", "needed", "y"),
        ("--max_steps 5", "max_steps", 5),
        ("--max-steps=-5", "max_steps", -5),
        ("--rate 1e-3", "rate", 1e-3),
        ("--kind two", "kind", "two"),
        ("--shown", "shown", True),
        ("--shown no", "shown", False),
        ("", "kept", True),
        ("--no_kept", "kept", False),
        ("--no-kept", "kept", False),
        ("--kept False", "kept", False),
        ("--names b c", "names", ["b", "c"]),
    ],
)
def test_values(words, name, value):
    assert getattr(parsed(words), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("here", "required: --needed/--also"),
        ("--needed x", "required: SOURCE"),
        ("here --needed x --max 5", "unknown argument --max "),
        ("here --needed x --secret=5", "unknown argument --secret "),
        ("here --needed x --max_steps five", "invalid int value: 'five'"),
        ("here --needed x --kind three", "invalid choice: 'three'"),
        ("here --needed x --shown maybe", "'maybe' is neither true nor false"),
        ("here --needed x --names", "expected at least one argument"),
        ("here --needed x --hidden 3", "unknown argument --hidden"),
        ("here there --needed x", "unknown argument there"),
    ],
)
def test_what_does_not_fit(words, message):
    with pytest.raises(ValueError, match=message):
        OptionParser(Options).options(words.split())


def test_the_rest_is_left_in_its_order():
    (options,), rest = OptionParser(Options).known_options("here --their 5 --needed x --more=y".split())
    assert options.needed == "x" and rest == ["--their", "5", "--more=y"]


def test_help_says_defaults_and_one_spelling():
    shown = " ".join(OptionParser(Options, description="What it does.", more="The end.").format_help().split())
    assert shown.startswith("usage: ") and "SOURCE [flags] What it does." in shown and shown.endswith("The end.")
    assert "--max_steps N a number (default: 3)" in shown and "--max-steps" not in shown
    assert "--kept, --no_kept on unless refused" in shown and "--kind {one,two}" in shown and "hidden" not in shown


@pytest.mark.parametrize(
    "words",
    [
        "--num_train_epochs 2 --weight_decay 0.1 --logging-steps 0.5 --max_steps -1",
        "--lr_scheduler_type cosine --optim sgd --save_strategy epoch --hub_strategy end",
        "--bf16_full_eval --no_skip_memory_metrics --gradient_checkpointing false --tf32 false",
        "--label_names a b --include_num_input_tokens_seen true --report_to none",
        '--lr_scheduler_kwargs {"a":1} --fsdp_config file.json --neftune_noise_alpha 5',
    ],
)
def test_inherited_flags_mean_what_they_mean_to_transformers(words):
    theirs, ours = HfArgumentParser(Inherited), OptionParser(Inherited)
    given = vars(ours.parse_args(words.split()))
    assert given and given.items() <= vars(theirs.parse_args(words.split())).items()
