"""`benchmarks/real.py` on the bundled model: killed and gone on with it measures what one run measures."""

import json
import os
import shutil
import signal

import pytest
from running import Command

from recurrent_drafter.assets import demo_drafter_path, sample_path
from recurrent_drafter.bench.tasks import GROUPS, KINDS, load_tasks
from recurrent_drafter.data.dialogues import DataError
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.provenance import resumed_records

FLAGS = ["--model", "demo", "--prompts", "1", "--reply_tokens", "12", "--output_file", "real.jsonl"]
TIMED = {"seconds", "first_seconds", "steps", "drafts", "sources"}  # `auto` follows the clock


def start(folder, *more):
    return Command(["benchmarks/real.py", *FLAGS, "--speculator_path", str(demo_drafter_path()), *more], folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "real.jsonl").read_text().splitlines()]


def untimed(folder):
    begun, *tasks = lines(folder)
    for task in tasks:
        task["runs"] = [{name: value for name, value in run.items() if name not in TIMED} for run in task["runs"]]
    return begun["settings"], tasks


def test_a_killed_run_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = start(whole).ended()
    assert ended.code == 0, ended.err
    command = start(killed)
    command.wait_for("2 of 6, ")
    os.kill(command.process.pid, signal.SIGKILL)
    command.ended()
    done = len(lines(killed)) - 1
    assert 2 <= done < 6
    with (killed / "real.jsonl").open("a") as file:
        file.write('{"kind": "task", "ta')  # what was being written
    assert f"{done} of 6 tasks" in start(killed, "--table_only").ended().out
    goes_on = start(killed).ended()
    assert goes_on.code == 0, goes_on.err
    assert f"{done} of 6, " not in goes_on.out and f"{done + 1} of 6, " in goes_on.out
    assert untimed(killed) == untimed(whole)
    settings, tasks = untimed(whole)
    assert [task["task"] for task in tasks] == list(KINDS) and {run["arm"] for run in tasks[0]["runs"]} == {
        *settings["arms"]
    }
    assert all(run["outcome"] == ["identical"] for task in tasks for run in task["runs"])
    runs = {run["arm"]: run for run in lines(whole)[3]["runs"]}
    for arm, sources in (
        ("autoregression", {0}),
        ("lookup", {0, 2}),
        ("drafter", {0, 1}),
        ("drafter + lookup", {0, 1, 2}),
    ):
        assert len(runs[arm]["sources"][0]) == runs[arm]["tokens"][0] and set(runs[arm]["sources"][0]) <= sources
    for text in (*GROUPS, "vs faster", "depth 1, 2, ...", "replies of at most 12 tokens, greedy, float32"):
        assert text in ended.out
    assert start(whole, "--table_only").ended().out == ended.out[ended.out.index("demo, 6 of 6 tasks") :]


def test_a_record_of_other_settings_is_refused(tmp_path):
    flags = ("--kinds", "SGD", "--arms", "autoregression")
    assert start(tmp_path, *flags).ended().code == 0
    kept = (tmp_path / "real.jsonl").read_bytes()
    for more, named in (
        (("--reply_tokens", "13"), "(reply_tokens: 12, now 13)"),
        (("--threads", "2"), "(threads: 1, now 2)"),
        (("--dtype", "bfloat16"), "dtype: float32, now bfloat16"),
        (("--prompts", "2"), "(prompts: "),
        (("--arms", "drafter"), "(arms: ['HF generate', 'autoregression'], now ['HF generate', 'drafter'])"),
    ):
        ended = start(tmp_path, *flags, *more).ended()
        (line,) = ended.err.splitlines()
        assert ended.code == 2 and line.startswith("error: real.jsonl was begun with other settings") and named in line
        assert (tmp_path / "real.jsonl").read_bytes() == kept


@pytest.mark.parametrize("content", ["my notes", '{"kind": "cell"}\n', "[]\n"])
def test_a_file_of_another_kind_stays_as_it_is(tmp_path, content):
    (tmp_path / "notes").write_text(content)
    with pytest.raises(ValueError, match="no record of a measurement"):
        resumed_records(tmp_path / "notes", {"settings": {}})
    assert (tmp_path / "notes").read_text() == content


def test_wrong_flags_are_refused_in_one_line(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"kind": "cell"}\n')
    for more, named in (
        ("--prompts 0", "--prompts is 0, expected at least 1"),
        ("--data nowhere", "nowhere has none for MT-Bench"),
        ("--speculator_path ./nowhere", "there is no drafter at ./nowhere"),
        ("--model ./nowhere", "there is no model at ./nowhere"),
        ("--model ./models/qwen2.5-coder-0.5b-instruct", "make real fetches it"),
        ("--output_file other.jsonl --table_only", "other.jsonl holds no task"),
    ):
        ended = start(tmp_path, *more.split()).ended()
        assert ended.code == 2 and named in ended.err.splitlines()[-1]
    alone = Command(["benchmarks/real.py", "--arms", "drafter"], tmp_path).ended()
    assert alone.code == 2 and "expected --speculator_path too" in alone.err


def test_tasks_of_whole_sets_are_held_out_ones(tmp_path):
    _, tokenizer = load_verifier("demo", dtype="float32")
    bundled = load_tasks(tokenizer, {"SGD": 3, "rewrite code": 2}, 512)
    assert [task.kind for task in bundled] == ["SGD", "rewrite code", "SGD", "rewrite code", "SGD"]
    assert "type hints and a docstring.\n\n```python\n" in tokenizer.decode(bundled[1].prompt)
    with pytest.raises(DataError, match="sgd_dev"):
        load_tasks(tokenizer, {"SGD": 3}, 512, tmp_path)
    shutil.copy(sample_path("sgd_dev.sharegpt.jsonl.gz"), tmp_path)
    with pytest.raises(DataError, match="ask for fewer"):
        load_tasks(tokenizer, {"SGD": 100}, 512, tmp_path)
    assert len(load_tasks(tokenizer, {"SGD": 3}, 512, tmp_path)) == 3
