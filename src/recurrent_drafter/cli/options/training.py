"""Options of what trains: read and checked before transformers, whose flags a training takes too, is loaded."""

import ast
import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from recurrent_drafter.cli.parser import OptionParser, unknown_argument
from recurrent_drafter.records.paths import check_folder
from recurrent_drafter.reproduce.plan import ReproduceOptions, plan_of, training_flags
from recurrent_drafter.training.options import TrainingOptions, check_paths


def check_train(options: TrainingOptions) -> None:
    if not options.demo:
        check_paths(options)
    if not options.demo and not options.estimate:
        check_folder(str(options.output_dir))


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


def check_reproduce(options: ReproduceOptions) -> None:
    check_paths(options)
    parser = OptionParser(TrainingOptions)
    for cell in plan_of(options).cells:
        read_training(parser, training_flags(cell, options, Path(options.output_dir)))
