"""``recurrent-drafter serve`` around a server that is not vLLM: what it starts, says, passes on and refuses."""

import json
import os
import shlex
import shutil
import signal
import socket
import sys

import pytest
from models import save_wrong_drafters
from running import Command
from vllm_stand_in import free_port, install

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path

SERVE = ["recurrent-drafter", "serve"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return {"PYTHONPATH": str(install(tmp_path_factory.mktemp("vllm")))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drafters with one thing wrong each."""
    folder = tmp_path_factory.mktemp("drafters")
    save_wrong_drafters(folder)
    shutil.copytree(demo_drafter_path(), folder / "cut")
    weights = folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def test_it_serves_and_reports(installed, tmp_path):
    port = free_port()
    flags = ["--beam-width", "7", "--beam_length", "4", "--port", str(port), "--max-model-len", "256"]
    config = '{"mine": 1, "recurrent_drafter": {"drafts": "sampled"}}'
    command = Command([*SERVE, "demo", *flags, "--additional-config", config], tmp_path, environment=installed)
    command.interrupt_when("Ctrl-C ends it")
    ended = command.ended()
    assert ended.code == 5, ended.err  # the server's own
    assert "heard SIGINT" in ended.err and "error" not in ended.err
    assert f"serving demo at http://localhost:{port}/v1" in ended.out
    (example,) = (line for line in ended.out.splitlines() if line.strip().startswith("curl"))
    body = json.loads(shlex.split(example)[-1])
    assert body["model"] == "demo" and body["messages"] and "/v1/chat/completions" in example
    assert "served 4 requests, 500 tokens, 80.0 tokens/s within a request" in ended.out
    assert "mean accepted length 2.50 in 100 drafts" in ended.out
    argv = json.loads((tmp_path / "argv.json").read_text())
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    assert given.pop("--dtype") in ("float32", "bfloat16", "auto")
    assert json.loads(given.pop("--speculative-config")) == {
        "model": str(demo_drafter_path()),
        "num_speculative_tokens": 4,
    }
    additional = json.loads(given.pop("--additional-config"))
    assert additional["mine"] == 1
    assert additional["recurrent_drafter"].items() >= {"drafts": "sampled", "beam_width": 7, "shed": True}.items()
    assert given == {
        "--model": str(demo_verifier_path()),
        "--served-model-name": "demo",
        "--port": str(port),
        "--max-model-len": "256",
    }


def test_another_signal_is_passed_on(installed, tmp_path):
    command = Command([*SERVE, "demo", "--port", str(free_port())], tmp_path, environment=installed)
    command.wait_for("Ctrl-C ends it")
    os.kill(command.process.pid, signal.SIGTERM)
    ended = command.ended()
    assert ended.code == 5 and "heard SIGTERM" in ended.err and "served 4 requests" in ended.out


def test_a_server_that_breaks_while_it_starts(installed, tmp_path):
    ended = Command([*SERVE, "demo", "--port", str(free_port()), "--break"], tmp_path, environment=installed).ended()
    assert ended.code == 3
    *_, reason, error = ended.err.splitlines()
    assert reason == "RuntimeError: no kernel image"
    assert error == "error: vLLM ended before it answered, with exit code 3: its last lines are above"
    assert "serving" not in ended.out


def test_a_server_that_dies_later(installed, tmp_path):
    ended = Command([*SERVE, "demo", "--port", str(free_port()), "--die"], tmp_path, environment=installed).ended()
    assert ended.code == 7
    assert ended.err.endswith("error: vLLM ended by itself, with exit code 7: its last lines are above\n")


def test_a_dry_run_needs_no_vllm(tmp_path):
    ended = Command([*SERVE, "--base_model", "demo", "--no_shed", "--api-key", "x", "--dry_run"], tmp_path).ended()
    assert ended.code == 0, ended.err
    executable, *words = shlex.split(ended.out)
    assert executable == sys.executable and words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert words[-2:] == ["--api-key", "x"] and '"shed": false' in ended.out


CASES = {
    "no verifier": (["--beam_width", "3"], "no verifier is named"),
    "missing model": (["./nowhere", "--speculator", str(demo_drafter_path())], "no model at ./nowhere"),
    "no drafter": ([str(demo_verifier_path())], "give --speculator_path"),
    "missing drafter": (["demo", "--speculator", "./nowhere"], "no drafter at ./nowhere"),
    "cut drafter": (["demo", "--speculator", "./cut"], "./cut is damaged"),
    "other width": (["demo", "--speculator", "./width"], "verifier of width 32 (other)"),
    "other tokenizer": (["demo", "--speculator", "./tokenizer"], "another tokenizer"),
    "too long": (["demo", "--beam-length", "7"], "--beam_length is 7, and the drafter"),
    "too many beams": (["demo", "--beam-width", "9999"], "expected 1 to 2048"),
    "no beams": (["demo", "--beam-width", "0"], "--beam_width is 0"),
    "no port": (["demo", "--port", "70000"], "expected 1 to 65535"),
    "no such address": (["demo", "--host", "203.0.113.1"], "of 203.0.113.1 cannot be listened at"),
    "own flag": (["demo", "--speculative_config", "{}"], "--speculative-config cannot be given here"),
    "own flag, in parts": (["demo", "--additional-config.x", "1"], "--additional-config cannot be given here"),
    "no JSON": (["demo", "--additional-config", "{"], "--additional_config is not JSON"),
    "no object": (["demo", "--additional-config", "[1]"], "expected a JSON object"),
    "no such setting": (["demo", "--additional-config", '{"recurrent_drafter": {"beams": 1}}'], "has 'beams' in it"),
    "a word too many": (["--model", "demo", "other"], "'other' belongs to no flag"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_starts_nothing(case, folder, installed):
    flags, message = CASES[case]
    port = [] if "--port" in flags else ["--port", str(free_port())]
    ended = Command([*SERVE, *flags, *port], folder, environment=installed).ended()
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert ended.err.startswith("error: ") and message in ended.err
    assert not (folder / "argv.json").exists()


def test_a_port_that_is_taken(installed, folder):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = Command([*SERVE, "demo", "--port", str(port)], folder, environment=installed).ended()
    assert ended.code == 2 and f"port {port} of this machine cannot be listened at" in ended.err


def test_another_vllm(tmp_path, folder):
    environment = {"PYTHONPATH": str(install(tmp_path / "other", version="0.31.0"))}
    flags = ["demo", "--port", str(free_port())]
    ended = Command([*SERVE, *flags], folder, environment=environment).ended()
    assert ended.code == 2 and "vLLM 0.31.0 is installed, and this was tested with 0.32.0" in ended.err
    ended = Command([*SERVE, *flags, "--any_vllm", "--break"], tmp_path / "run", environment=environment).ended()
    assert ended.code == 3


def test_without_the_plugin(installed, folder):
    environment = installed | {"VLLM_PLUGINS": "another"}
    ended = Command([*SERVE, "demo", "--port", str(free_port())], folder, environment=environment).ended()
    assert ended.code == 2 and "vLLM will not find the plugin" in ended.err and "VLLM_PLUGINS (another)" in ended.err
