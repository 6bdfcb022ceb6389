"""What is wrong with a command line, found before anything loads: paths, contradictions, what cannot be written.

A command's ``check_...`` takes its options, and raises ValueError or OSError with one line for the user.
"""

import ast
import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from recurrent_drafter.cli.options.decoding import (
    EvaluationOptions,
    GenerateOptions,
    SamplingOptions,
    SpeculatorOptions,
)
from recurrent_drafter.cli.options.measuring import BenchOptions, PromptOptions, TuneOptions, VerifyOptions
from recurrent_drafter.cli.options.publishing import ConvertOptions, DeployOptions
from recurrent_drafter.cli.parser import OptionParser, unknown_argument
from recurrent_drafter.records.paths import TUNING_FILE, check_folder, check_writable, is_path
from recurrent_drafter.reproduce.plan import ReproduceOptions, plan_of, training_flags
from recurrent_drafter.training.options import TrainingOptions, check_paths

SAMPLED = 0.8  # the temperature of a verification's sampled pass


def check_generate(
    which: SpeculatorOptions, sampling: SamplingOptions, options: GenerateOptions, asked: EvaluationOptions
) -> None:
    sampling.arguments()
    if options.autoregressive and which.drafting:
        raise ValueError(f"--autoregressive drafts nothing: drop {' and '.join(which.drafting)}")
    if asked.given and not options.is_evaluation:
        raise ValueError(f"{' and '.join(asked.given)} only matters with --eval_mt_bench or --compare")
    if options.prompt is not None and (asked.dataset_path is not None or asked.max_num_prompts is not None):
        raise ValueError("--dataset_path and --max_num_prompts choose among questions: drop them, or --prompt")
    check_paths(which, asked)
    if not options.autoregressive:
        which.drafter()


def check_verify(
    which: SpeculatorOptions, sampling: SamplingOptions, prompts: PromptOptions, options: VerifyOptions
) -> None:
    sampling.arguments(SAMPLED)
    check_paths(which, prompts, options)
    which.drafter()


def check_tune(which: SpeculatorOptions, prompts: PromptOptions, options: TuneOptions) -> None:
    check_paths(which, prompts, options)
    which.drafter()
    tuning_folder(which, options)


def tuning_folder(which: SpeculatorOptions, options: TuneOptions) -> Path:
    """Where to save, found to be writable before anything is measured."""
    if (which.beam_width, which.beam_length, which.max_tree_nodes) != (None, None, None):
        raise ValueError(
            "tune finds the shape: give --widths and --lengths to try instead of one --beam_width and so on"
        )
    if options.output_dir is not None:
        folder = Path(options.output_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if options.copy_drafter and (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds a model already, which --copy_drafter would overwrite: name another folder"
            )
    elif which.speculator_path is None:
        raise ValueError(
            "the bundled drafter stays as it is: give --output_dir DIR (and --copy_drafter, to use it there)"
        )
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
        options.drafter()


def check_deploy(options: DeployOptions) -> None:
    folder = Path(options.model_path).expanduser()
    if not folder.is_dir():
        raise OSError(f"there is no drafter at {folder}: expected the folder that train_speculator.py saved it to")
    check_paths(options)
    from recurrent_drafter.formats.hub_names import check_repo_name, is_hub_name

    check_repo_name(options.repo_name)
    if options.base_model is not None and not is_hub_name(options.base_model):
        raise ValueError(f"--base_model {options.base_model} is no name on the Hub: expected such as gpt2 or user/name")


def check_convert(options: ConvertOptions) -> None:
    target, source = Path(options.target).expanduser(), Path(options.source).expanduser()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OSError(f"{target} exists already: give a new folder, or an empty one")
    if not source.is_dir() and (source.exists() or is_path(options.source)):
        raise OSError(f"there is no drafter at {options.source}: expected a folder, or a name on the Hub")
    check_paths(options)


def check_reproduce(options: ReproduceOptions) -> None:
    check_paths(options)
    parser = OptionParser(TrainingOptions)
    for cell in plan_of(options).cells:
        read_training(parser, training_flags(cell, options, Path(options.output_dir)))


def read_training(parser: OptionParser, argv: Sequence[str]) -> tuple[TrainingOptions]:
    """Our options of a training, settled and checked; of transformers' own flags only the names are.

    ``--help-all`` is the help with these, and takes as long as transformers takes to load.
    """
    if "--help-all" in argv:
        from recurrent_drafter.training.arguments import TrainingArguments

        OptionParser(TrainingArguments, prog=parser.prog, description=parser.description or "").print_help()
        raise SystemExit(0)
    (options,), rest = parser.known_options(argv)
    for place, word in enumerate(rest):
        flag = re.match(r"--?([a-zA-Z][\w-]*)", word)
        if flag[1].replace("-", "_") not in inherited_flags() if flag else place == 0:
            raise unknown_argument(word)
    options.settle()
    options.check()
    options.refuse_idle([word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word[:2] == "--"])
    return (options,)


@cache
def inherited_flags() -> frozenset[str]:
    """Names of transformers' own options of a training: read in its source, because to import it takes seconds."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations
    source = Path(package.submodule_search_locations[0]) / "training_args.py"
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
    (body,) = (node.body for node in classes if node.name == "TrainingArguments")
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    names = {node.target.id for node in fields if isinstance(node.target, ast.Name)}
    return frozenset(names | {f"no_{name}" for name in names})


def check_train(options: TrainingOptions) -> None:
    if not options.demo:
        check_paths(options)
    if not options.demo and not options.estimate:
        check_folder(str(options.output_dir))
