"""Commands as a user runs them: processes of their own, with real streams, terminals and signals.

They are forked from a server that has imported the package, so that a dozen seconds of imports are paid for once.
"""

import multiprocessing
import os
import pty
import re
import resource
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from recurrent_drafter.cli.main import main
from recurrent_drafter.training import targets

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([f"recurrent_drafter.cli.{name}" for name in ("main", "train", "generate", "bench")])
SECONDS = 100


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int | None
    out: str
    err: str


def _become(
    argv: list[str], folder: Path, terminal: str | None, constants: dict[str, float], environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    os.chdir(folder)
    os.environ.update(environment)
    if "FILE_LIMIT" in environment:  # bytes: what a full disk does, without one
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environment["FILE_LIMIT"]),) * 2)
    if "PYTHONPATH" in environment:  # this process has been forked from one that began without
        sys.path.insert(0, environment["PYTHONPATH"])
    os.environ["COLUMNS"] = "80"
    torch.set_num_threads(1)  # other work on the machine then costs its share, not a multiple of it
    if terminal is not None:
        os.login_tty(os.open(terminal, os.O_RDWR))
        sys.stdin = open(0, closefd=False)
    else:
        for stream, number in ((".stdout", 1), (".stderr", 2)):
            os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=True)
    for name, value in constants.items():
        setattr(targets, name, value)
    sys.argv = argv
    if argv[0] == "recurrent-drafter":
        sys.exit(main(argv[1:]))
    else:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


class Command:
    """A command that has been started in a folder; ``constants`` of --quick may be set for it."""

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        terminal: str | None = None,
        environment: dict[str, str] | None = None,
        **constants: float,
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.process = CONTEXT.Process(
            target=_become, args=(argv, folder, terminal, constants, environment or {}), daemon=True
        )
        self.process.start()

    def wait_for(self, pattern: str) -> None:
        """Return as soon as the command has written this."""
        until = time.monotonic() + SECONDS
        while not re.search(pattern, text := self._read(".stdout") + self._read(".stderr")):
            assert self.process.is_alive() and time.monotonic() < until, f"{pattern!r} did not appear: {text}"
            time.sleep(0.02)

    def interrupt_when(self, pattern: str) -> None:
        """Send the signal of Ctrl-C as soon as the command has written this."""
        self.wait_for(pattern)
        os.kill(self.process.pid, signal.SIGINT)

    def ended(self) -> Ended:
        """Wait for the end."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
        return Ended(self.process.exitcode, self._read(".stdout"), self._read(".stderr"))

    def _read(self, stream: str) -> str:
        path = self.folder / stream
        return path.read_text() if path.exists() else ""


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, argv: list[str], folder: Path) -> None:
        self.master, slave = pty.openpty()
        self.command = Command(argv, folder, os.ttyname(slave))
        self.shown, self._seen = "", 0
        self._slave = slave

    def expect(self, pattern: str) -> str:
        """Read on until the pattern shows; returns what came before its end, since the last call."""
        os.set_blocking(self.master, False)
        until = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.shown[self._seen :])):
            if time.monotonic() > until:
                raise AssertionError(f"{pattern!r} did not appear in {self.shown[self._seen :]!r}")
            try:
                self.shown += os.read(self.master, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
        text = self.shown[self._seen : self._seen + found.end()]
        self._seen += found.end()
        return text

    def type(self, text: str) -> None:
        """Type this; \\x03 is Ctrl-C."""
        os.write(self.master, text.encode())

    def ended(self) -> int | None:
        """Wait for the end; returns the exit code."""
        code = self.command.ended().code
        os.close(self.master)
        os.close(self._slave)
        return code
