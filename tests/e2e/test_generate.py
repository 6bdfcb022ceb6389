"""Replies and chats at the command line."""

import re
import subprocess
import sys

import pytest
from running import ROOT, Command, Terminal

FIGURES = r"Generated (\d+) tokens in [\d.]+ s \([\d.]+ tok/s, ([\d.]+) tokens/step\)"
PROMPT = "I need a table for two in San Jose."
DEMO = ["generate_speculator.py", "--base_model", "demo"]


def test_a_reply_with_and_without_drafter(tmp_path):
    speculative = Command([*DEMO, "--prompt", PROMPT], tmp_path / "a").ended()
    alone = Command([*DEMO, "--prompt", PROMPT, "--autoregressive"], tmp_path / "b").ended()
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
    chat = Terminal([*DEMO, "--interactive", "--max_generation_length", "40"], tmp_path)
    chat.expect("You: ")
    chat.type(f"{PROMPT}\n")
    first = chat.expect(FIGURES)
    chat.expect("You: ")
    chat.type("At seven, please.\n")
    chat.expect(FIGURES)
    chat.expect("You: ")
    chat.type("/reset\n")
    chat.expect("You: ")
    chat.type(f"{PROMPT}\n")
    assert strip(chat.expect(FIGURES)) == strip(first)  # the history is forgotten
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


@pytest.mark.parametrize("name", ["reproduce", "serve", "convert"])
def test_what_comes_later_says_so(name, capsys):
    from recurrent_drafter.cli.main import main

    assert main([name]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
