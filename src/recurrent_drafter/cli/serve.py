"""``recurrent-drafter serve``: vLLM's own OpenAI server with a drafter in it, checked before any model loads."""

import json
import re
import shlex
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.cli.options.decoding import drafter_path
from recurrent_drafter.cli.options.serving import ServeOptions, flag_names
from recurrent_drafter.models.loading import computes_in_bfloat16, load_drafter, load_outline
from recurrent_drafter.vllm.checking import check_length

PAUSE = 0.2  # seconds between two looks at the process
READ_EVERY = 10.0  # seconds between two looks at its metrics, for a report even if it dies
SAMPLE = re.compile(r"([\w:]+)(?:\{.*\})? (\S+)")


def run(options: ServeOptions, flags: Sequence[str], *, argv: list[str]) -> int:
    path = drafter_path(options.base_model, options.speculator_path)
    drafter = load_drafter(path)
    model, tokenizer = load_outline(options.base_model, drafter, path)
    most = drafter.config.draft_vocab_size
    if (options.beam_width or 1) > most:
        raise ValueError(f"--beam_width is {options.beam_width}, expected 1 to {most} (the draft vocabulary)")
    check_length(path, drafter.config, options.beam_length or drafter.config.beam_length, "--beam_length")
    dtype = chosen_dtype(options.dtype, model)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(options, path, dtype), *flags]
    if options.dry_run:
        print(shlex.join(command))
        return 0
    given = flag_names(flags)
    scheme = "https" if "--ssl-certfile" in given else "http"
    host = "localhost" if options.host in (None, "0.0.0.0", "::") else str(options.host)
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}"
    print(f"starting vLLM with {options.base_model} ({dtype}) and the drafter {path}; its log follows", flush=True)
    example = request(url, options, tokenizer, given)
    welcome = f"\nserving {options.names[0]} at {url}/v1; for example\n\n  {example}\n"
    return Server(command, url, f"{welcome}\nCtrl-C ends it and shows what was served.").run()


def chosen_dtype(asked: str, model: PreTrainedModel) -> str:
    """What vLLM computes in. Left alone it turns float32 into bfloat16, which not every CPU has arithmetic for."""
    if asked != "auto" or torch.cuda.is_available():
        return asked
    return "bfloat16" if model.config.dtype == torch.bfloat16 and computes_in_bfloat16("cpu") else "float32"


def arguments(options: ServeOptions, path: str, dtype: str) -> list[str]:
    """Of vLLM's server: the verifier, the drafter, and where to listen."""
    model = str(demo_verifier_path()) if options.base_model == "demo" else options.base_model
    local = Path(path).expanduser()
    speculative: dict[str, Any] = {"model": str(local.resolve()) if local.is_dir() else path}
    if options.beam_length is not None:
        speculative["num_speculative_tokens"] = options.beam_length
    listen = [*([] if options.host is None else ["--host", options.host]), "--port", str(options.port)]
    drafting = ["--speculative-config", json.dumps(speculative), "--additional-config", json.dumps(options.additional)]
    return ["--model", model, "--served-model-name", *options.names, "--dtype", dtype, *listen, *drafting]


def request(url: str, options: ServeOptions, tokenizer: PreTrainedTokenizerBase, given: set[str]) -> str:
    """A command that asks the server something: a chat, or a text to complete where there is no chat template."""
    body: dict[str, Any] = {"model": options.names[0], "max_tokens": 64}
    if tokenizer.chat_template or "--chat-template" in given:
        kind, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello! What can you do?"}]
    else:
        kind, body["prompt"] = "completions", "Once upon a time"
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if "--api-key" in given else []
    return shlex.join(
        ["curl", f"{url}/v1/{kind}", *key, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    )


def served(page: str) -> str:
    """What a server has done so far, by vLLM's page of metrics.

    Tokens/s are of requests that have ended, over their seconds from arrival to end, all together. A draft is one
    verification.
    """
    found = totals(page)
    requests, tokens = found["vllm:request_success_total"], found["vllm:generation_tokens_total"]
    finished, seconds = found["vllm:request_generation_tokens_sum"], found["vllm:e2e_request_latency_seconds_sum"]
    drafts = found["vllm:spec_decode_num_drafts_total"]
    speed = f", {finished / seconds:.1f} tokens/s within a request" if seconds else ""
    drafted = "nothing was drafted"
    if drafts:
        length = 1 + found["vllm:spec_decode_num_accepted_tokens_total"] / drafts
        drafted = f"mean accepted length {length:.2f} in {drafts:,.0f} drafts"
    return f"served {requests:,.0f} requests, {tokens:,.0f} tokens{speed}; {drafted}"


def totals(page: str) -> Counter[str]:
    r"""The samples of a page in Prometheus' text format, summed over their labels; 0 for what is not there.

    >>> found = totals('# TYPE a counter\na_total{engine="0"} 2.0\na_total{engine="1"} 3.5\nb 1')
    >>> found["a_total"], found["b"], found["c"]
    (5.5, 1.0, 0)
    """
    sums: Counter[str] = Counter()
    for line in page.splitlines():
        if (sample := SAMPLE.fullmatch(line)) is not None:
            sums[sample[1]] += float(sample[2])  # type: ignore[assignment]
    return sums


class Server:
    """A server that ``command`` starts, its log on stderr; announced once ``url`` answers, reported on at the end."""

    def __init__(self, command: Sequence[str], url: str, welcome: str) -> None:
        self.command, self.url, self.welcome = command, url, welcome
        self.metrics: str | None = None  # the page as last read; None until it answers
        self._asked_to_end = False
        self._heard: SimpleQueue[int] = SimpleQueue()
        unchecked = ssl.create_default_context()  # the server is our own child, whose certificate may be for any name
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked)
        )

    def run(self) -> int:
        """Serve until the process ends; its exit code, 128 and the signal's number where a signal ended it."""
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.signal(number, lambda heard, _: self._heard.put(heard))
                stack.callback(signal.signal, number, before)
            # A group of its own: Ctrl-C reaches it once, through this process.
            process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=sys.stderr, process_group=0)
            try:
                self._attend(process)
            finally:  # after an error of our own, such as a closed stdout, it would go on alone
                process.terminate()
                process.wait()
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if self.metrics is not None:
            print(served(self.metrics), flush=True)
        if self._asked_to_end and self.metrics is None:
            print("ended before it answered", file=sys.stderr)
        if not self._asked_to_end:
            when = "before it answered" if self.metrics is None else "by itself"
            print(f"error: vLLM ended {when}, with exit code {code}: its last lines are above", file=sys.stderr)
            return code or 1
        return code

    def _attend(self, process: subprocess.Popen[bytes]) -> None:
        next_read = 0.0
        while process.poll() is None:
            self._pass_on(process)
            if self.metrics is None and self._get("/health") is not None:
                self.metrics = ""
                print(self.welcome, flush=True)
            elif self.metrics is not None and time.monotonic() >= next_read:
                self.metrics = self._get("/metrics") or self.metrics
                next_read = time.monotonic() + READ_EVERY

    def _pass_on(self, process: subprocess.Popen[bytes]) -> None:
        """Hand a signal to the server, if one comes soon; what it has served is read before it goes."""
        try:
            number = self._heard.get(timeout=PAUSE)
        except Empty:
            return
        if self.metrics is not None and not self._asked_to_end:
            self.metrics = self._get("/metrics") or self.metrics
        self._asked_to_end = True
        process.send_signal(number)

    def _get(self, path: str) -> str | None:
        """A page of the server; None where it does not answer, or not with one."""
        try:
            with self._opener.open(self.url + path, timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, HTTPException):
            return None
