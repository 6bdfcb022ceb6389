"""The paper's comparisons by one command: a very small grid, run as a user would."""

import json
import re

import pytest
from running import Command

from recurrent_drafter.assets import sample_path
from recurrent_drafter.measure.replies import HeldOutReplies, load_replies
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_drafter, load_verifier
from recurrent_drafter.models.verifier import Verifier

COMMAND = [
    "experiment_paper_reproduction.py",
    "--quick",
    "--scopes",
    "assistant",
    "--seeds",
    "0",
    "--max_examples",
    "6",
]
COMMAND += [
    "--eval_max_examples",
    "3",
    "--eval_max_new_tokens",
    "12",
    "--eval_widths",
    "2",
    "--draft_vocab_size",
    "256",
]
COMMAND += ["--eval_dataset_path", str(sample_path("mt_bench.jsonl")), "--output_dir", "out"]
GRID = ["--methods", "ground_truth", "distilled", "--cell_seconds", "2"]
SWEEPS = ["--widths", "1", "3", "--lengths", "2", "5", "--batch_size", "1", "2", "--sweep_prompts", "2"]
FLAGS = ["--train_flags", "--model_max_length 64 --logging_steps 1"]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The folder of a small reproduction, and what the command printed."""
    folder = tmp_path_factory.mktemp("reproduced")
    ended = Command([*COMMAND, *GRID, *SWEEPS, *FLAGS], folder).ended()
    assert ended.code == 0, ended.out + ended.err
    return folder, ended.out


def records(folder) -> dict[str, dict]:
    lines = (folder / "out/results.jsonl").read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def test_every_job_has_its_line(reproduced):
    folder, out = reproduced
    names = ["calibration", "demo-assistant-distilled-no_rnn-seed0", "demo-assistant-ground_truth-seed0",
             "demo-assistant-distilled-seed0", "shapes", "tree", "vocabulary"]  # fmt: skip
    assert list(records(folder)) == names and all(r["status"] == "finished" for r in records(folder).values())
    assert len(list((folder / "out/targets").glob("distilled-*"))) == 1, "two trainings, one distillation"
    assert all(f"[{number} of 7] {name}" in out for number, name in enumerate(names, 1))


def test_all_trainings_take_equally_many_steps(reproduced):
    folder, _ = reproduced
    found = records(folder)
    steps = [record["steps"] for record in found.values() if record["kind"] == "training"]
    assert steps == [found["calibration"]["max_steps"]] * 3


def test_the_figures_are_those_of_the_saved_drafter(reproduced):
    folder, _ = reproduced
    model, _ = load_verifier("demo", dtype="float32")
    held_out = HeldOutReplies(Verifier(model), load_replies(folder / "out/replies/mt_bench.safetensors"))
    name = "demo-assistant-distilled-seed0"
    (entry,) = records(folder)[name]["evaluations"]
    drafter = load_drafter(folder / "out/jobs" / name)
    expected = held_out.tokens_per_step(drafter, DraftShape(2, 5))
    assert sum(entry["tokens"]) / sum(entry["steps"]) == pytest.approx(expected) and len(entry["steps"]) == 3


def test_the_sweeps_measure_what_they_say(reproduced):
    folder, _ = reproduced
    found = records(folder)
    assert [batch["batch_size"] for batch in found["shapes"]["batches"]] == [1, 2]
    assert all(batch["bugs"] == 0 and "auto" in batch["decoded"] for batch in found["shapes"]["batches"])
    (tree,) = found["tree"]["rows"]
    assert 5 <= tree["distinct"] <= tree["candidates"] == 15
    assert [row["size"] for row in found["vocabulary"]["rows"]] == [128, 256]


def test_the_report_stands_alone(reproduced):
    folder, _ = reproduced
    page = (folder / "out/report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", page) and "https://" not in page
    titles = ("Does distillation gain?", "Beam width and length", "Batch size", "What the prefix tree saves")
    titles += ("Size of the draft vocabulary", "With and without recurrence", "Nothing: every job has finished.")
    assert all(title in page for title in titles)
    assert "--cell_seconds 2" in page and "Distilled targets over ground truth" in page


def test_the_same_command_again_does_nothing_anew(reproduced):
    folder, _ = reproduced
    before = (folder / "out/results.jsonl").read_bytes()
    ended = Command([*COMMAND, *GRID, *SWEEPS, *FLAGS], folder).ended()
    assert ended.code == 0 and "7 of 7 jobs are finished" in ended.out and "held-out" not in ended.out
    assert (folder / "out/results.jsonl").read_bytes() == before


def test_other_settings_are_not_mixed_in(reproduced):
    folder, _ = reproduced
    ended = Command([*COMMAND, *GRID, *SWEEPS, *FLAGS, "--max_examples", "7"], folder).ended()
    assert ended.code == 2 and "other settings (max_examples)" in ended.err.splitlines()[-1]


def test_a_training_that_fails_is_reported(tmp_path):
    broken = "--model_max_length 64 --learning_rate 1e30 --max_grad_norm 0 --warmup_steps 0"
    command = [*COMMAND, "--methods", "ground_truth", "--cell_seconds", "20", "--no_sweeps", "--train_flags", broken]
    ended = Command(command, tmp_path).ended()
    assert ended.code == 1 and "1 of 2 jobs have failed: demo-assistant-ground_truth-seed0" in ended.err
    assert re.search("ValueError: the loss is (nan|inf)", (tmp_path / "out/report.md").read_text())


def test_an_interrupt_costs_the_training_at_hand(tmp_path):
    grid = ["--methods", "ground_truth", "--seeds", "0", "1", "--cell_seconds", "3", "--no_sweeps", *FLAGS]
    command = Command([*COMMAND, *grid], tmp_path)
    command.interrupt_when(r"\[3 of 3\].*\n(.*\n)*step \d+: held-out")
    ended = command.ended()
    assert ended.code == 130 and "it goes on after the last finished job" in ended.err
    assert list(records(tmp_path)) == ["calibration", "demo-assistant-ground_truth-seed0"]
    ended = Command([*COMMAND, *grid], tmp_path).ended()
    assert ended.code == 0 and "[3 of 3]" in ended.out and "[2 of 3]" not in ended.out
    assert len(records(tmp_path)) == 3
