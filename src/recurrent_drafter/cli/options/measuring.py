"""Options of what measures and checks: verify, tune, bench, demo, and the scripts that show or check something."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recurrent_drafter.cli.options import decoding
from recurrent_drafter.cli.options.decoding import SourceOptions, no_drafter, require
from recurrent_drafter.records.paths import TUNING_FILE, check_drafter, check_model, check_readable, check_writable
from recurrent_drafter.training.options import check_paths, option

SAMPLED = 0.8  # the temperature of a verification's sampled pass


@dataclass(frozen=True)
class PromptOptions(SourceOptions):
    prompts: int | None = option(None, "how many: default 50 (tune: 20)", least=1)
    new_tokens: int = option(128, "tokens per reply; at most, with --no_sustained", least=2)
    sustained: bool = option(True, "go on after end tokens; otherwise replies stop there")


@dataclass(frozen=True)
class VerifyOptions:
    batch_size: int = option(1, "prompts decoded together, of different lengths", least=1)
    auto: bool = option(False, "also with the tree that follows cost and acceptance")
    output_file: str | None = option(None, "every comparison, as JSON", check=check_writable)


@dataclass(frozen=True)
class TuneOptions:
    """Which shapes of draft to try, and where to save what was found."""

    batch_size: list[int] = option([1], "batch sizes; the first decides", least=1)
    widths: list[int] = option([1, 2, 3, 4, 6, 8], "beam widths to try", least=1)
    lengths: list[int] = option([2, 3, 4, 5, 6, 8], "beam lengths to try", least=1)
    confirm: int = option(3, "how many of the best shapes to decode with", least=1)
    output_dir: str | None = option(None, "where tuning.json and tuning.png go: default the drafter's own folder")
    copy_drafter: bool = option(False, "copy the drafter into --output_dir, which then is a tuned drafter")

    def __post_init__(self) -> None:
        for name in ("batch_size", "widths", "lengths"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"--{name} names a number twice")
        require(not self.copy_drafter or self.output_dir is not None, "--copy_drafter needs --output_dir")


@dataclass(frozen=True)
class BenchOptions(decoding.PairOptions, SourceOptions):
    assistant_model: str | None = option(
        None, "a smaller model of the same vocabulary, for HF assisted generation", check=check_model
    )
    prompts: int = option(20, "how many; rounded down to full batches", least=1)
    max_prompt_length: int = option(512, "tokens of a prompt at most")
    new_tokens: int = option(128, "tokens per reply: exactly, or at most with --reply", least=2)
    reply: bool = option(False, "stop at the model's end token")
    batch_size: int = option(1, "prompts generated from together")
    temperature: float = option(0.0, "0 is greedy")
    seed: int = option(0, "of sampling")
    beam_width: int = option(10, "of the arm with a fixed shape", least=1)
    beam_length: int = option(4, "of the arm with a fixed shape", least=1)
    profile: bool = option(False, "also show where a step's time and memory go")
    output_file: str | None = option(None, "every run as a JSON line", check=check_writable)
    join: list[str] | None = option(
        None,
        "nothing is run: the arms of several generate_speculator.py --output_file side by side",
        check=check_readable,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.batch_size <= self.prompts,
            f"--batch_size is {self.batch_size}, expected 1 to --prompts, {self.prompts}",
        )
        require(self.temperature >= 0, f"--temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.join is not None and len(self.join) < 2:
            raise ValueError(f"--join {self.join[0]}: expected two files, one of them of --autoregressive")


@dataclass(frozen=True)
class DemoOptions(decoding.LookupOptions):
    prompts: int = option(30, "held-out prompts", least=1)
    new_tokens: int = option(128, "tokens per prompt (sustained), at most (reply)", least=2)
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the hardware computes in it")
    skip_training: bool = option(False, "compare with the bundled drafter only")
    speculator_path: str | None = option(None, "a drafter to compare too, instead of training", check=check_drafter)


@dataclass(frozen=True)
class ConversationOptions(decoding.DeviceOptions, SourceOptions):
    """Which conversation, and as the tokens of which model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "in float32 equal means equal; elsewhere ties may occur"
    )
    conversation: int = option(0, "which of them, counted from 0", least=0)
    model_max_length: int = option(512, "tokens of it that are looked at", least=2)


@dataclass(frozen=True)
class TargetOptions:
    distill_num_future_tokens: int = option(5, "K, tokens per position", least=1)
    train_on_assistant_only: bool = option(True, "positions of the assistant's replies, as in the paper; otherwise all")
    positions: int | None = option(None, "only so many, from the first one on", least=1)


def check_verify(
    which: decoding.SpeculatorOptions, sampling: decoding.SamplingOptions, asked: PromptOptions, options: VerifyOptions
) -> None:
    sampling.arguments(SAMPLED)
    check_paths(which, asked, options)
    which.check_speculation(*which.shape)


def check_tune(which: decoding.SpeculatorOptions, prompts: PromptOptions, options: TuneOptions) -> None:
    check_paths(which, prompts, options)
    require(which.drafter is not None, f"lookup needs no tuning, it learns as it goes; {no_drafter(which.base_model)}")
    tuning_folder(which, options)


def tuning_folder(which: decoding.SpeculatorOptions, options: TuneOptions) -> Path:
    """Where to save, found to be writable before anything is measured."""
    if which.shape:
        raise ValueError("tune finds the shape: give --widths and --lengths instead of one --beam_width and so on")
    if options.output_dir is not None:
        folder = Path(options.output_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if options.copy_drafter and (folder / "config.json").exists():
            raise ValueError(f"{folder} holds a model, which --copy_drafter would overwrite: name another folder")
    elif which.speculator_path is None:
        raise ValueError("the bundled drafter stays as is: give --output_dir DIR (and --copy_drafter, to use it there)")
    else:
        folder = Path(which.speculator_path).expanduser()
        if not folder.is_dir():
            raise OSError(f"{folder} is not a local folder: give --output_dir DIR for what tune writes")
    try:
        check_writable(folder / TUNING_FILE)
    except OSError as error:
        raise OSError(f"{error}; --output_dir DIR names another, --copy_drafter makes a tuned drafter of it") from None
    return folder


def check_bench(options: BenchOptions) -> None:
    check_paths(options)
    if options.join is None:
        options.check_speculation()
