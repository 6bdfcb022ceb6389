"""The commands that the documents show are the commands that there are."""

import re
import shlex

import pytest
from running import ROOT

from recurrent_drafter import __version__
from recurrent_drafter.cli import (
    bench,
    convert,
    demo,
    deploy,
    endtoend,
    generate,
    reproduce,
    serve,
    show_scope,
    show_targets,
    train,
    tune,
    verify,
)
from recurrent_drafter.cli.errors import parse
from recurrent_drafter.cli.main import main

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (bench, convert, demo, deploy, generate, reproduce, tune, verify)
OPTIONS = {module.__name__.rpartition(".")[2]: module.OPTIONS for module in COMMANDS} | {
    "generate_speculator.py": generate.OPTIONS,
    "experiment_paper_reproduction.py": reproduce.OPTIONS,
    "huggingface_deployment.py": deploy.OPTIONS,
    "test_distilled_dataset.py": show_targets.OPTIONS,
    "demonstrate_training_scope.py": show_scope.OPTIONS,
    "test_simple_end_to_end.py": endtoend.OPTIONS,
    "test_end_to_end.py": endtoend.OPTIONS,
}


def commands() -> list[str]:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    inline = [line for line in re.findall(r"`([^`\n]+)`", text) if " --" in line]
    return sorted({line for line in blocks + inline if re.match(r"(python \w+\.py|recurrent-drafter|make) ", line)})


def test_there_are_commands():
    assert len(commands()) > 8


def test_several_services_parse(capsys):
    assert train.main(["--report_to", "wandb", "tensorboard", "--run_name", "two", "--demo"]) == 0


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command, capsys):
    program, *argv = shlex.split(command, comments=True)
    if program == "make":
        targets = [word for word in argv if "=" not in word]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
        return
    name, *flags = argv
    if name in ("train_speculator.py", "train"):
        assert train.main([*flags, "--demo"]) == 0, capsys.readouterr().err
    elif name == "serve":
        serve.parsed(flags)
    else:
        parse(flags, "", *OPTIONS[name])


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recurrent-drafter {__version__}\n"
