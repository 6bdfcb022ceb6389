"""The commands that the documents show are the commands that there are."""

import re
import shlex

import pytest
from running import ROOT

from recurrent_drafter import __version__
from recurrent_drafter.cli.main import COMMANDS, SCRIPTS, launch, main

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOT_SCRIPTS = {
    "train_speculator.py": "train",
    "generate_speculator.py": "generate",
    "experiment_paper_reproduction.py": "reproduce",
    "huggingface_deployment.py": "deploy",
    "test_distilled_dataset.py": "show_targets",
    "demonstrate_training_scope.py": "show_scope",
    "test_simple_end_to_end.py": "check",
    "test_end_to_end.py": "check_all",
}


def commands() -> list[str]:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    inline = [line for line in re.findall(r"`([^`\n]+)`", text) if " --" in line]
    return sorted({line for line in blocks + inline if re.match(r"(python \w+\.py|recurrent-drafter|make) ", line)})


def test_there_are_commands():
    assert len(commands()) > 8


def test_several_services_parse(capsys):
    assert launch("train", ["--report_to", "wandb", "tensorboard", "--run_name", "two", "--demo"]) == 0


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command, capsys):
    program, *argv = shlex.split(command, comments=True)
    if program == "make":
        targets = [word for word in argv if "=" not in word]
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)
        return
    word, *flags = argv
    name = ROOT_SCRIPTS.get(word, word)
    if "--help" in flags:
        with pytest.raises(SystemExit) as ended:
            launch(name, flags)
        assert ended.value.code == 0
    elif name == "train":
        assert launch("train", [*flags, "--demo"]) == 0, capsys.readouterr().err
    else:
        command = (COMMANDS | SCRIPTS)[name]
        command.read(command.parser(), flags)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recurrent-drafter {__version__}\n"
