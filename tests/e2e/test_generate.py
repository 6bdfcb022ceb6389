"""Replies and chats at the command line."""

import io
import re
import shutil
import subprocess
import sys

import pytest
from running import ROOT, Command, Terminal

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.cli.main import launch, main

FIGURES = r"Generated (\d+) tokens in [\d.]+s \([\d.]+ tok/s, ([\d.]+) tokens/step\)(?:, \d+ from [a-z]+)*"
KEPT = r"prompts: (\d+) tokens of which (\d+) were kept"
PROMPT = "I need a table for two in San Jose."
DEMO = ["generate_speculator.py", "--base_model", "demo"]
FIXED = ["--beam_width", "3", "--beam_length", "4"]


def test_a_reply_with_and_without_drafter(tmp_path):
    speculative = Command([*DEMO, "--prompt", PROMPT, "--dtype", "float32"], tmp_path / "a").ended()
    alone = Command([*DEMO, "--prompt", PROMPT, "--dtype", "float32", "--autoregressive"], tmp_path / "b").ended()
    assert (speculative.code, alone.code) == (0, 0), speculative.err + alone.err
    texts = [re.split(FIGURES, done.out) for done in (speculative, alone)]
    assert texts[0][:2] == texts[1][:2]
    assert len(texts[0][0].split()) > 3
    assert float(texts[0][2]) > 1.5 and float(texts[1][2]) == 1.0


def test_the_script_in_an_interpreter_of_its_own(tmp_path):
    command = [sys.executable, str(ROOT / "generate_speculator.py"), "--prompt", PROMPT, "--max_generation_length", "9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and re.search(FIGURES, done.stdout), done.stderr


def test_a_chat(tmp_path):
    chat = Terminal([*DEMO, "--interactive", "--max_generation_length", "40", "--dtype", "float32"], tmp_path)
    chat.expect("You: ")
    chat.type(f"{PROMPT}\n")
    first = chat.expect(FIGURES)
    chat.expect("You: ")
    chat.type("At seven, please.\n")
    chat.expect(FIGURES)
    chat.expect("You: ")
    chat.type("/reset\n")
    chat.expect("You: ")
    chat.type(3 * "\x1b[A" + "\n")  # up to the first line again
    assert said(chat.expect(FIGURES)) == said(first) != ""  # the history is forgotten
    chat.expect("You: ")
    chat.type("\x03")
    chat.expect("/quit ends")
    chat.expect("You: ")
    chat.type("/quit\n")
    assert chat.ended() == 0


def test_ctrl_c_ends_a_reply_and_the_chat_goes_on(tmp_path):
    chat = Terminal([*DEMO, "--interactive", "--autoregressive", "--max_generation_length", "400"], tmp_path)
    chat.expect("You: ")
    chat.type("Solve this problem step by step. Ann has 3 boxes of 12 pens and gives away 9. How many are left?\n")
    chat.expect(r"Assistant: \w")
    chat.type("\x03")
    assert "Traceback" not in chat.expect(r"\[interrupted\][^G]*Generated \d+ tokens")
    chat.expect("You: ")
    chat.type(f"{PROMPT}\n")
    chat.expect(FIGURES)
    chat.expect("You: ")
    chat.type("\x04")
    assert chat.ended() == 0


def strip(shown: str) -> str:
    return re.sub(FIGURES, "", shown)


def said(shown: str) -> str:
    return strip(shown).partition("Assistant: ")[2]


@pytest.mark.parametrize("name", ["serve"])
def test_what_comes_later_says_so(name, capsys):
    assert main([name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_accepted_drafts_are_colored_and_nothing_else_changes(tmp_path):
    plain = Command([*DEMO, "--prompt", PROMPT, *FIXED], tmp_path / "a").ended()
    environment = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    command = [*DEMO, "--prompt", PROMPT, *FIXED, "--show_drafts"]
    shown = Command(command, tmp_path / "b", environment=environment).ended()
    colored = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", shown.out, re.S)
    legend, reply = shown.out.split("\n", 1)
    assert len("".join(colored)) > 10 and re.sub(r"\x1b\[[\d;]*m", "", legend) == "accepted drafts of drafter"
    assert strip(re.sub(r"\x1b\[[\d;]*m", "", reply)) == strip(plain.out)


def chat_about(lines, monkeypatch, capsys):
    """A chat in this process: what was printed after each prompt for input, and the errors."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert launch("generate", ["--interactive", "--max_generation_length", "24", "--dtype", "float32", *FIXED]) == 0
    shown = capsys.readouterr()
    return shown.out.split("You: ")[1:], shown.err.splitlines()


def test_commands_of_a_chat(monkeypatch, capsys):
    lines = ["/stats", PROMPT, "/speculate off", "/reset", PROMPT, "/stats"]
    lines += ["/temp 1.5", "/seed 3", "/reset", PROMPT, "/speculate on", "/reset", PROMPT, "/temp 0", "/reset", PROMPT]
    shown, errors = chat_about([*lines, "/quit", "never read"], monkeypatch, capsys)
    replies = {number: strip(text) for number, text in enumerate(shown) if lines[number : number + 1] == [PROMPT]}
    first, alone, warm, warm_drafted, cold = replies.values()
    assert first == alone == cold != warm == warm_drafted and not errors
    assert "nothing has been said yet" in shown[0]
    assert [shown[n].strip() for n in (2, 3, 6, 7, 10)] == [
        *("without drafts", "from the beginning", "temperature 1.5", "seed 3", "with drafts")
    ]
    assert "1.00 tokens/step" in shown[4] and "1.00 tokens/step" not in shown[1]
    with_drafts, without = shown[5].split("\n")[:2]
    assert re.match(r"with drafts: 1 reply, \d+ tokens in .* tokens/step\), \d+% of drafted tokens", with_drafts)
    assert re.match(r"without drafts: 1 reply, \d+ tokens in .* 1\.00 tokens/step\)$", without)


def test_a_turn_reads_what_is_new_and_forgetting_changes_no_reply(monkeypatch, capsys):
    follow_up = "At seven, please."
    lines = [PROMPT, follow_up, "/stats", "/speculate off", "Thank you!", "/stats"]
    lines += ["/reset", PROMPT, "/speculate on", follow_up, "Thank you!", "/stats"]
    shown, errors = chat_about(lines, monkeypatch, capsys)
    replies = [strip(shown[n]) for n in (0, 1, 4, 7, 9, 10)]
    assert replies[:3] == replies[3:] and not errors
    counted = [tuple(map(int, re.search(KEPT, shown[n].replace(",", "")).groups())) for n in (2, 5, 11)]
    prompts = [text for text, _ in counted]
    read = [text - kept for text, kept in counted]
    assert read[0] < prompts[0] and read[1] - read[0] < 30 < prompts[1] - prompts[0]
    assert read[2] - read[1] < read[1]  # what every conversation begins with is kept too


def test_lookup_beside_a_drafter_or_off(capsys):
    """The same reply, and whose tokens it is made of is said."""
    told, short = f"{PROMPT} {PROMPT}", ["--beam_width", "1", "--beam_length", "1"]
    shown = {}
    for name, flags in {"both": [], "drafter": ["--no_lookup"], "fixed": short, "added": [*short, "--lookup"]}.items():
        command = ["--prompt", told, "--dtype", "float32", "--max_generation_length", "40", *flags]
        assert launch("generate", command) == 0
        shown[name] = capsys.readouterr().out
    assert len({strip(text) for text in shown.values()}) == 1
    assert "from lookup" not in shown["drafter"] + shown["fixed"] and "from drafter" in shown["fixed"]
    assert "from lookup" in shown["added"]


def test_a_model_without_a_drafter(monkeypatch, capsys, tmp_path):
    """Another name for the demo model, of which no drafter is known."""
    shutil.copytree(demo_verifier_path(), tmp_path / "mine")
    model = ["--base_model", str(tmp_path / "mine"), "--dtype", "float32"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/speculate off\n/reset\n{PROMPT}\n/stats\n"))
    assert launch("generate", [*model, "--interactive", "--max_generation_length", "24"]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("lookup alone:") and f"--llm_name_or_path {tmp_path / 'mine'}" in line
    shown = said.out.split("You: ")[1:]
    assert strip(shown[0]) == strip(shown[3]) and "without drafts: 1 reply" in shown[4]
    few = ["--prompts", "2", "--new_tokens", "12"]
    assert launch("verify", [*model, *few]) == 0
    assert "speculation" in capsys.readouterr().out
    assert launch("bench", [*model, *few]) == 0
    table = capsys.readouterr().out
    assert "HF prompt lookup" in table and re.search(r"^ *lookup ", table, re.M) and "auto " not in table


def test_bytes_that_are_no_text_end_no_chat(monkeypatch, capsys):
    shown, errors = chat_about([PROMPT, "caf\udce9", "/stats"], monkeypatch, capsys)
    assert errors == ["error: that line holds bytes that are no text: expected UTF-8"]
    assert "1 reply" in shown[2]


def test_what_is_no_command_changes_nothing(monkeypatch, capsys):
    lines = [PROMPT, "/temp -1", "/temp warm", "/seed", "/sped 3", "/speculate maybe", "/reset now", "/reset", PROMPT]
    shown, errors = chat_about(lines, monkeypatch, capsys)
    assert strip(shown[0]) == strip(shown[8])
    assert [error[:7] for error in errors] == ["error: "] * 6
    assert "expected 0 (greedy), or 0.001 or more" in errors[0] and "expected a number after /temp" in errors[1]
    assert all("there are /reset /stats" in error for error in errors[3:])
