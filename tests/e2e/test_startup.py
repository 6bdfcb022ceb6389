"""What a command needs before it answers: neither torch nor transformers for help, a wrong flag or a wrong path."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest
import transformers
from running import ROOT

from recurrent_drafter.cli.main import COMMANDS, launch
from recurrent_drafter.cli.options.training import inherited_flags
from recurrent_drafter.training.options import TrainingOptions

spec = importlib.util.spec_from_file_location("startup", ROOT / "benchmarks/startup.py")
startup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(startup)

HEAVY = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "numpy", "rich", "safetensors")
PROBE = f"""
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", *(name for name in {HEAVY} if name in sys.modules)))
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module("recurrent_drafter.cli.main", run_name="__main__", alter_sys=True)
"""


def python(code, *argv, folder=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("case", startup.CASES)
@pytest.mark.parametrize("name", startup.MISSING)
def test_nothing_heavy_loads_for_an_answer(name, case, tmp_path):
    program = [str(ROOT / name)] if name.endswith(".py") else ["recurrent-drafter", name]
    ended = python(PROBE, *program, *startup.words(name, case), folder=tmp_path)
    *shown, loaded = ended.stdout.splitlines()
    assert loaded == "loaded:"
    if case in ("--help", "--version"):
        assert ended.returncode == 0 and not ended.stderr
        assert shown[0].startswith("usage: " if case == "--help" else "recurrent-drafter 0.")
        return
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and not shown and list(tmp_path.iterdir()) == []
    assert (startup.words(name, case)[-2] if case == "unknown flag" else "nowhere") in line


def test_every_command_and_script_is_among_them():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert set(startup.MISSING) == {*COMMANDS, *scripts}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset_name sharegtp", "unknown dataset 'sharegtp'"),
        ("--dataset_path nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("--chat_template nowhere.jinja", "neither a Jinja template nor a file"),
        ("--phase eval --drafter_name_or_path ./nowhere", "no drafter at ./nowhere"),
        ("--resume_from_checkpoint ./nowhere", "no checkpoint at ./nowhere"),
        ("--output_dir file/inside", "file is a file"),
        ("--quick --use_knowledge_distillation", "exclude each other"),
        ("--drafter_num_layers -1", "expected at least 0"),
        ("--learning_rate fast", "invalid float value: 'fast'"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_they_load(flags, message, tmp_path):
    (tmp_path / "file").write_text("")
    ended = python(PROBE, "recurrent-drafter", "train", *flags.split(), folder=tmp_path)
    assert ended.returncode == 2 and message in ended.stderr and ended.stdout == "loaded:\n"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("generate", "--prompt Hi --autoregressive --lookup", "--autoregressive drafts nothing: drop --lookup"),
        ("generate", "--prompt Hi --no_lookup", "--no_lookup leaves nothing to draft with"),
        ("verify", "--no-lookup", "--no_lookup leaves nothing to draft with"),
        ("verify", "--beam_width 3", "--beam_width only matters with a drafter: no drafter"),
        ("bench", "--lookup false", "train one with train_speculator.py --llm_name_or_path ./model"),
        ("tune", "--output_dir ./tuned", "lookup needs no tuning"),
    ],
)
def test_what_cannot_be_drafted_is_refused_before_they_load(command, flags, message, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    words = ["--base_model", "./model", *flags.split()]
    ended = python(PROBE, "recurrent-drafter", command, *words, folder=tmp_path)
    assert ended.returncode == 2 and ended.stdout == "loaded:\n"
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "tuned").exists()


def test_the_names_of_inherited_flags_are_those_of_the_class():
    fields = [field for field in dataclasses.fields(transformers.TrainingArguments) if field.init]
    names = {field.name for field in fields}
    assert {name for name in inherited_flags() if not name.startswith("no_")} == names
    assert {f"no_{field.name}" for field in fields if field.default is True} <= inherited_flags()


def test_options_that_transformers_has_too_keep_its_defaults():
    theirs = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    ours = {field.name: field for field in dataclasses.fields(TrainingOptions)}
    changed = {
        *("per_device_train_batch_size", "learning_rate", "train_sampling_strategy", "eval_strategy"),
        *("load_best_model_at_end", "report_to"),
    }
    assert {name for name in ours.keys() & theirs.keys() if ours[name].default != theirs[name].default} == changed


def test_inherited_flags_reach_the_training(capsys):
    assert launch("train", ["--demo", "--num-train-epochs", "2", "--weight_decay", "x"]) == 2
    assert "argument --weight_decay/--weight-decay: invalid float value: 'x'" in capsys.readouterr().err
    assert launch("train", ["--demo", "--adam-beta2", "0.9", "--no_average_tokens_across_devices"]) == 0


def test_all_help_is_for_those_who_ask(capsys):
    for flag, inherited in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit) as ended:
            launch("train", [flag])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and "--drafter_num_layers" in shown and ("--adam_beta2" in shown) == inherited


LAZY = """
import sys, recurrent_drafter
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert set(recurrent_drafter.__all__) <= set(dir(recurrent_drafter))
import transformers
known = lambda: "recurrent_drafter" in transformers.models.auto.configuration_auto.CONFIG_MAPPING
assert not known()
{}
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model("recurrent_drafter", hidden_size=8, vocab_size=16, exit_dim=8)
assert known() and type(AutoModel.from_config(config)).__name__ == "RecurrentDrafter"
"""


@pytest.mark.parametrize(
    "statement", ["from recurrent_drafter import RecurrentDrafter", "import recurrent_drafter.models"]
)
def test_names_load_on_first_use_and_register_the_drafter(statement):
    ended = python(LAZY.format(statement))
    assert ended.returncode == 0, ended.stderr


def test_a_name_that_is_none():
    import recurrent_drafter

    with pytest.raises(AttributeError, match="has no attribute 'Drafter'"):
        recurrent_drafter.Drafter  # noqa: B018
