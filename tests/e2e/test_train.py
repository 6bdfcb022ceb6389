"""Training at the command line: to the end, interrupted, resumed."""

import json
import re

import pytest
import torch
from running import Command
from safetensors.torch import load_file

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.parsing import read_records

TRAIN = ["train_speculator.py", "--llm_name_or_path", "demo"]
FEW = ["--eval_max_examples", "2", "--eval_max_new_tokens", "12"]
SMALL = [*FEW, "--model_max_length", "64", "--per_device_train_batch_size", "2", "--draft_vocab_size", "512"]
RESUME = ["--resume_from_checkpoint", "True"]


@pytest.fixture
def conversations(tmp_path):
    """Sixty bundled conversations in a file."""
    path = tmp_path / "few.jsonl"
    records = (record for _, record in read_records(sample_path("sgd_dev.sharegpt.jsonl.gz")))
    path.write_text("\n".join(json.dumps(record) for record, _ in zip(records, range(60), strict=False)))
    return ["--dataset_path", str(path)]


def test_ground_truth_from_the_bundled_data(tmp_path):
    command = [*TRAIN, *SMALL, "--dataset_name", "demo", "--max_steps", "3", "--output_dir", "new"]
    ended = Command(command, tmp_path).ended()
    assert ended.code == 0, ended.err
    assert re.search(r"held-out tokens per step: \d\.\d\d", ended.out)
    assert {"config.json", "model.safetensors", "run.json"} <= {path.name for path in (tmp_path / "new").iterdir()}
    assert json.loads((tmp_path / "new" / "run.json").read_text())["argv"][0] == "train_speculator.py"
    ended = Command(["generate_speculator.py", "--speculator_path", "./new", "--prompt", "Hello"], tmp_path).ended()
    assert ended.code == 0 and "tokens/step" in ended.out, ended.err


@pytest.mark.parametrize("method", [[], ["--use_distilled_dataset", "--distill_max_examples", "4"]])
def test_an_interrupted_training_ends_with_the_same_weights(method, tmp_path, conversations):
    command = [*TRAIN, *SMALL, *conversations, *method, "--max_steps", "12", "--logging_steps", "1"]
    command += ["--output_dir", "out", "--eval_strategy", "steps", "--eval_steps", "4"]
    whole = Command(command, tmp_path / "whole").ended()
    assert whole.code == 0, whole.err

    broken = Command(command, tmp_path / "broken")
    broken.interrupt_when(r"step 4: held-out")
    ended = broken.ended()
    assert ended.code == 130, ended.out + ended.err
    assert len(ended.err.splitlines()) <= 2 and "--resume_from_checkpoint True" in ended.err, ended.err
    assert not (tmp_path / "broken/out/model.safetensors").exists()
    resumed = Command([*command, *RESUME], tmp_path / "broken").ended()
    assert resumed.code == 0 and "going on from" in resumed.out, resumed.err
    ours, theirs = (load_file(tmp_path / run / "out/model.safetensors") for run in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    other = Command([*command, *RESUME, "--draft_vocab_size", "300"], tmp_path / "broken").ended()
    assert other.code == 2 and "belongs to another run" in other.err.splitlines()[-1], other.err


def test_an_interrupted_quick_training_goes_on_with_its_own_text(tmp_path):
    command = ["train_speculator.py", "--quick", *FEW]
    seconds = {"QUICK_SECONDS": 14, "QUICK_TEXT_SECONDS": 1, "QUICK_REPLIES": 8, "QUICK_REPLY_TOKENS": 24}
    broken = Command(command, tmp_path, **seconds)
    broken.interrupt_when(r"step \d+: held-out")
    ended = broken.ended()
    assert ended.code == 130 and "--resume_from_checkpoint True" in ended.err, ended.out + ended.err
    folder = tmp_path / "models/demo-recurrent-drafter"
    text = (folder / "text.safetensors").read_bytes()
    resumed = Command([*command, *RESUME], tmp_path, **seconds).ended()
    assert resumed.code == 0 and "going on from" in resumed.out, resumed.out + resumed.err
    assert (folder / "text.safetensors").read_bytes() == text
    assert (folder / "model.safetensors").exists()


def test_an_interrupt_before_the_first_step_says_what_to_do(tmp_path):
    early = Command([*TRAIN, *SMALL, "--dataset_name", "demo", "--use_distilled_dataset"], tmp_path)
    early.interrupt_when("training data")
    ended = early.ended()
    assert ended.code == 130 and "run the same command again" in ended.err, ended.out + ended.err
    assert "Traceback" not in ended.err
