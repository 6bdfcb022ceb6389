"""The root scripts that show and check: they pass on what is sound, and fail on what is not."""

import json
import re
import sys

import pytest
from running import Command

from recurrent_drafter.cli import conversation, endtoend
from recurrent_drafter.cli.main import launch

SHORT = ["--positions", "6", "--distill_num_future_tokens", "3"]


def test_targets_are_what_generate_gives(capsys):
    assert launch("show_targets", SHORT) == 0
    shown = capsys.readouterr().out
    assert re.search(r"6 the same, 0 numeric ties, 0 bugs", shown)
    lines = [line for line in shown.splitlines() if line.endswith("  same")]
    assert len(lines) == 6 and all(line.count("|") >= 2 for line in lines)
    assert "What city >" in lines[1]


def test_other_targets_are_a_bug(monkeypatch, capsys):
    honest = conversation.distil
    monkeypatch.setattr(conversation, "distil", lambda *a, **k: [rows.roll(1, 0) for rows in honest(*a, **k)])
    assert launch("show_targets", SHORT) == 1
    assert "BUG (margin" in capsys.readouterr().out


def test_all_positions_of_another_file(tmp_path, capsys):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, what can I do?"}]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": talk}))
    argv = ["--dataset_path", str(tmp_path / "one.jsonl")]
    assert launch("show_targets", [*argv, "--no_train_on_assistant_only"]) == 0
    positions = int(re.search(r"at each of (\d+) positions of the conversation", capsys.readouterr().out)[1])
    assert launch("show_scope", argv) == 0
    table = capsys.readouterr().out
    assert int(re.search(r"without it +(\d+ +){3}(\d+)", table)[2]) == positions
    assert "[[Hello, what can I do?<|end|>]]" in table and "[[<|user|>Hi" in table


def test_counts_of_both_scopes(capsys):
    assert launch("show_scope", []) == 0
    shown = capsys.readouterr().out
    rows = {m[1]: [int(x) for x in m[2].split()] for m in re.finditer(r"^ (--\w+|without it) +([\d ]+)$", shown, re.M)}
    replies, whole = rows["--train_on_assistant_only"], rows["without it"]
    assert replies[0] == whole[0] == replies[1] + replies[2] == whole[2]
    assert replies[2] < whole[2] and replies[3] < whole[3]


def test_color_at_a_terminal(monkeypatch, capsys):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("NO_COLOR", "")):
        monkeypatch.setenv(name, value)
    assert launch("show_scope", []) == 0
    shown = capsys.readouterr().out
    assert "\x1b[1;32m" in shown and "[[" not in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["test_distilled_dataset.py", "--conversation", "9999"], "expected less than 300"),
        (["test_distilled_dataset.py", "--distill_num_future_tokens", "0"], "expected at least 1"),
        (["test_distilled_dataset.py", "--distill_num_future_tokens", "5000"], "do not fit the context"),
        (["demonstrate_training_scope.py", "--dataset_path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["demonstrate_training_scope.py", "--base_model", "./nowhere"], "no model at ./nowhere"),
        (["test_simple_end_to_end.py", "--quick"], "unknown argument --quick"),
        (["test_end_to_end.py", "--base_model", "./nowhere"], "no model at ./nowhere"),
    ],
)
def test_one_clear_line(argv, message, tmp_path):
    ended = Command(argv, tmp_path).ended()
    assert ended.code == 2, ended.out + ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_short_check_passes(tmp_path):
    ended = Command(["test_simple_end_to_end.py"], tmp_path).ended()
    assert ended.code == 0, ended.out + ended.err
    assert [line.split(": ")[1] for line in ended.out.splitlines() if line.startswith("PASS")] == [
        *("train", "save", "load", "decode", "verify", "evaluate")
    ]
    assert "6 passed, 0 failed" in ended.out and list(tmp_path.glob("[!.]*")) == []


def test_a_step_that_fails_is_named_and_the_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(endtoend.Journey, "train", lambda journey: "nothing")
    monkeypatch.setattr(endtoend.Journey, "save", lambda journey: "nothing")
    assert launch("check", []) == 1
    shown = capsys.readouterr().out
    assert "FAIL  demo: load: OSError" in shown and "2 passed, 1 failed" in shown


def test_a_failing_command_shows_what_it_said(monkeypatch, capsys):
    for name in ("train", "save", "load", "decode"):
        monkeypatch.setattr(endtoend.Journey, name, lambda journey: "nothing")
    monkeypatch.setattr(endtoend, "launch", lambda name, argv: sys.stdout.write("12 BUG") and 1)
    assert launch("check", []) == 1
    assert re.search(r"FAIL  demo: verify: exit code 1.*12 BUG", capsys.readouterr().out, re.S)


def test_pytest_leaves_the_scripts_alone(request):
    assert request.config.getini("testpaths") == ["tests"]
