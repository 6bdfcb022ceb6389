"""``recurrent-drafter serve`` with vLLM itself: one server with the bundled pair, and what clients may do to it."""

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from recurrent_drafter.bench.workload import demo_prompts
from recurrent_drafter.cli.serve import totals
from recurrent_drafter.models.loading import load_verifier

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
CONTEXT, REPLY = 256, 40
SMALL = f"--max-model-len {CONTEXT} --max-num-seqs 4 --enforce-eager --kv-cache-memory-bytes {64 << 20}"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
SECONDS = 300


class Served:
    """A running server, and how a client asks it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as trial:
            trial.bind(("", 0))
            self.port = trial.getsockname()[1]
        self.output = folder / "output"
        words = f"serve demo --beam-width 4 --beam-length 4 --no_shed --dtype float32 --port {self.port} {SMALL}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recurrent_drafter.cli.main", *shlex.split(words)],
            stdout=self.output.open("w"),
            stderr=(folder / "log").open("w"),
            env={**os.environ, **ENVIRONMENT},
        )
        self.log = folder / "log"

    def wait(self) -> None:
        until = time.monotonic() + SECONDS
        while "Ctrl-C ends it" not in self.output.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://localhost:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def open(self, path: str, body: dict) -> http.client.HTTPResponse:
        sent = urllib.request.Request(
            f"http://localhost:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(sent, timeout=120)

    def complete(self, tokens: torch.Tensor, **options) -> dict:
        body = {"model": "demo", "prompt": tokens.tolist(), "max_tokens": REPLY, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, **options}  # fmt: skip
        with self.open("/v1/completions", body) as answer:
            return json.load(answer)["choices"][0]

    def running(self) -> float:
        return totals(self.get("/metrics"))["vllm:num_requests_running"]

    def resident(self) -> int:
        whole = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in [whole, *whole.children(recursive=True)])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.process.wait(60)


@pytest.fixture(scope="module")
def known():
    """Prompts, and what transformers says to them greedily in float32."""
    model, tokenizer = load_verifier("demo", dtype="float32")
    prompts = [prompt for length in (17, 64, 130) for prompt in demo_prompts(tokenizer, 2, length)]
    replies = []
    for prompt in prompts:
        output = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=REPLY, do_sample=False,
            eos_token_id=[-1], pad_token_id=0,
        )  # fmt: skip
        replies.append(output[0, len(prompt) :].tolist())
    return list(zip(prompts, replies, strict=True))


def test_it_is_healthy_and_drafts(served, known):
    served.get("/health")
    assert json.loads(served.get("/v1/models"))["data"][0]["id"] == "demo"
    served.complete(known[0][0])
    found = totals(served.get("/metrics"))
    assert found["vllm:spec_decode_num_drafts_total"] > 0
    assert found["vllm:spec_decode_num_accepted_tokens_total"] > 0


def test_completions_are_those_of_transformers(served, known):
    assert [served.complete(prompt)["token_ids"] for prompt, _ in known] == [reply for _, reply in known]


def test_the_example_that_it_prints_works(served):
    (example,) = (line for line in served.output.read_text().splitlines() if line.strip().startswith("curl"))
    words = shlex.split(example)
    path = re.sub(r"^http://[^/]+", "", words[1])
    with served.open(path, json.loads(words[-1])) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"].strip()


def test_a_stream_says_the_same(served, known):
    prompt, reply = known[0]
    body = {"model": "demo", "prompt": prompt.tolist(), "max_tokens": REPLY, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": True}  # fmt: skip
    tokens, pieces = [], 0
    with served.open("/v1/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                tokens += json.loads(line[6:])["choices"][0]["token_ids"] or []
                pieces += 1
    assert tokens == reply
    assert 1 < pieces < REPLY  # several tokens at a time


def test_clients_that_go_away_leave_nothing_running(served, known):
    prompt, reply = known[1]
    for _ in range(5):
        connection = http.client.HTTPConnection("localhost", served.port, timeout=60)
        body = {"model": "demo", "prompt": prompt.tolist(), "max_tokens": 120, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(20)
        connection.close()
    until = time.monotonic() + 60
    while served.running() > 0:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert served.complete(prompt)["token_ids"] == reply


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"max_tokens": 0},
        {"prompt": [1] * (CONTEXT + 1)},
        {"prompt": [1 << 30]},
        {"model": "other"},
    ],
)
def test_a_wrong_request_is_refused_and_the_next_is_served(served, known, wrong):
    prompt, reply = known[2]
    with pytest.raises(urllib.error.HTTPError) as error:
        served.complete(prompt, **wrong)
    assert 400 <= error.value.code < 500
    assert served.complete(prompt)["token_ids"] == reply


@pytest.mark.slow
def test_five_hundred_requests_leave_memory_as_it_was(served, known):
    prompts = [prompt for prompt, _ in known]

    def ask(count):
        for number in range(count):
            served.complete(prompts[number % len(prompts)], max_tokens=8)
        return served.resident()

    before = ask(100)
    assert ask(400) < 1.05 * before


def test_a_signal_ends_it_with_a_report(served):
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0, served.log.read_text()[-4000:]
    report = served.output.read_text().splitlines()[-1]
    found = re.fullmatch(
        r"served (\d[\d,]*) requests, [\d,]+ tokens, [\d.]+ tokens/s within a request; "
        r"mean accepted length ([\d.]+) in [\d,]+ drafts",
        report,
    )
    assert found and int(found[1].replace(",", "")) > 8 and 1 < float(found[2]) <= 5, report
    assert "Traceback" not in served.log.read_text()
