"""How far a phase is, by a scripted clock: lines in a pipe, a bar on a terminal."""

import io
import threading

import pytest
from rich.console import Console

from recurrent_drafter.cli import progress
from recurrent_drafter.cli.progress import Meter, every_ten_seconds, how_far, tracked
from recurrent_drafter.cli.train import TrainingTerminal
from recurrent_drafter.training.callbacks import Progress


class Script:
    """A clock that stands still until time is let pass, which rings every ten seconds."""

    def __init__(self):
        self.now, self.tells = 0.0, []

    def __call__(self):
        return self.now

    def ticking(self, tell):
        self.tells.append(tell)
        return lambda: self.tells.remove(tell)

    def passes(self, seconds):
        for _ in range(int(seconds // 10)):
            self.now += 10
            for tell in list(self.tells):
                tell()


@pytest.fixture
def script():
    return Script()


def piped(script):
    console = Console(file=io.StringIO(), width=40)
    return {"console": console, "clock": script, "ticking": script.ticking}, console.file


def test_a_line_every_ten_seconds_with_rate_and_time_left(script):
    how, lines = piped(script)
    for number in tracked(range(8), "answering [all] of them", "prompts", **how):
        script.passes(20 if number < 2 else 10)
    assert lines.getvalue().splitlines()[:6] == [
        "answering [all] of them: 0 of 8",
        "answering [all] of them: 0 of 8",
        "answering [all] of them: 1 of 8, 0.033 prompts/s, 3:30 left",
        "answering [all] of them: 1 of 8, 0.025 prompts/s, 4:40 left",
        "answering [all] of them: 2 of 8, 0.04 prompts/s, 2:30 left",
        "answering [all] of them: 3 of 8, 0.05 prompts/s, 1:40 left",
    ]
    script.passes(60)
    assert len(lines.getvalue().splitlines()) == 10, "its end ends the lines"


def test_things_that_count_as_several_and_an_end_that_nobody_knows(script):
    how, lines = piped(script)
    for _ in tracked(iter([3, 2]), "verifying", "prompts", total=5, counted=lambda rows: rows, **how):
        script.passes(10)
    for _ in tracked(iter("ab"), "reading", "texts", **how):
        script.passes(10)
    told = lines.getvalue().splitlines()
    assert told[1] == "verifying: 3 of 5, 0.15 prompts/s, 0:13 left" and told[3] == "reading: 1, 0.05 texts/s"


def test_what_was_done_before_took_no_time_and_a_count_that_begins_again(script):
    how, lines = piped(script)
    with Meter("training", unit="steps", **how) as meter:
        script.passes(10)
        meter.update(100, 200)
        script.passes(10)
        meter.update(150, 200, "loss 2.1")
        script.passes(10)
        meter.update(0, 40)
        script.passes(10)
        meter.update(20)
        script.passes(10)
    assert lines.getvalue().splitlines() == [
        "training: 0:10 so far",
        "training: 100 of 200",
        "training: 150 of 200, 2.5 steps/s, 0:20 left  loss 2.1",
        "training: 0 of 40",
        "training: 20 of 40, 1 steps/s, 0:20 left",
    ]


def test_one_phase_within_another_is_shown_alone(script):
    how, lines = piped(script)
    with Meter("outer", **how):
        script.passes(10)
        with Meter("inner", **how):
            script.passes(10)
        script.passes(10)
    assert [line.split(":")[0] for line in lines.getvalue().splitlines()] == ["outer", "inner", "outer"]


def test_an_error_ends_the_lines(script):
    how, _ = piped(script)
    with pytest.raises(ZeroDivisionError):
        for number in tracked(range(3), "dividing", "numbers", **how):
            1 / number
    assert not script.tells and not progress._open


def test_a_terminal_shows_a_bar_and_the_same_words(script):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    for _ in tracked(range(4), "answering", "prompts", console=console, clock=script):
        script.now += 0.5
    shown = console.file.getvalue()
    assert "━" in shown and "4 of 4, 2 prompts/s, 0:00 left" in shown


def test_lines_come_while_a_single_thing_takes_long(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.001)
    rung = threading.Event()
    stop = every_ten_seconds(rung.set)
    assert rung.wait(60)
    stop()
    rung.clear()
    assert not rung.wait(0.05)


def test_rates_have_two_digits():
    told = {done: how_far(done, 10_000, 10, unit="tokens") for done in (1, 94, 101, 9_000)}
    assert [line.split(", ")[1] for line in told.values()] == [
        "0.1 tokens/s",
        "9.4 tokens/s",
        "10 tokens/s",
        "900 tokens/s",
    ]


def test_a_training_tells_every_phase(script, monkeypatch, capsys):
    monkeypatch.setattr(progress.Meter, "__init__", _scripted(progress.Meter.__init__, script))
    with TrainingTerminal() as terminal:
        script.passes(10)
        terminal(Progress("data", "training data: mine"))
        script.passes(10)
        terminal(Progress("evaluation", "evaluation: the verifier's replies"))
        terminal(Progress("evaluation", done=1, total=4))
        script.passes(10)
        terminal(Progress("evaluation", done=2, total=4))
        script.passes(10)
        terminal(Progress("training", "loss 3.0", 0.0, 1.0))
        script.passes(10)
        terminal(Progress("training", "loss 2.0", 0.5, 1.0))
        script.passes(10)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["training data: mine", "evaluation: the verifier's replies"]
    assert shown.err.splitlines() == [
        "loading: 0:10 so far",
        "data: 0:10 so far",
        "evaluation: 1 of 4",
        "evaluation: 2 of 4, 0.05 replies/s, 0:40 left",
        "training: 0%  loss 3.0",
        "training: 50%, 0:20 left  loss 2.0",
    ]


def _scripted(own, script):
    return lambda self, *args, **how: own(self, *args, **{**how, "clock": script, "ticking": script.ticking})
