"""vLLM's server as a process of its own: waiting for it, passing signals on, reading what it has served."""

import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PAUSE = 0.2  # seconds between two looks at the process
READ_EVERY = 10.0  # seconds between two looks at its metrics, for a report even if it dies
SAMPLE = re.compile(r"([\w:]+)(?:\{.*\})? (\S+)")


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
    """A server that is started, announced when it answers, and reported on at its end.

    Args:
        command: starts it. Its output goes to stderr.
        url: where it will answer.
        announce: called once, when it does.
    """

    def __init__(self, command: Sequence[str], url: str, announce: Callable[[], None]) -> None:
        self.command, self.url, self.announce = command, url, announce
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
        with self._listening():
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
                self.announce()
            elif self.metrics is not None and time.monotonic() >= next_read:
                self._read()
                next_read = time.monotonic() + READ_EVERY

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, _: Any) -> None:
            self._heard.put(number)

        before = {number: signal.signal(number, note) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, process: subprocess.Popen[bytes]) -> None:
        """Hand a signal to the server, if one comes soon; what it has served is read before it goes."""
        try:
            number = self._heard.get(timeout=PAUSE)
        except Empty:
            return
        if self.metrics is not None and not self._asked_to_end:
            self._read()
        self._asked_to_end = True
        process.send_signal(number)

    def _read(self) -> None:
        page = self._get("/metrics")
        self.metrics = self.metrics if page is None else page

    def _get(self, path: str) -> str | None:
        """A page of the server; None where it does not answer, or not with one."""
        try:
            with self._opener.open(self.url + path, timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, HTTPException):
            return None
