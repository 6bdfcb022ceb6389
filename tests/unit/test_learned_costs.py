"""What decoding learns of the machine: seconds by nodes from the steps alone, kept for the next process."""

import json
import random
import time

import numpy as np
import pytest

from recurrent_drafter.decoding import experience as experience_module
from recurrent_drafter.decoding.costs import GUESS, KNOTS, Costs, LearnedCosts
from recurrent_drafter.decoding.experience import SAVED, Experience
from recurrent_drafter.decoding.lookup import Memory
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.records.paths import cache_folder

CLIFF = Costs(rows=(1, 2, 3, 8, 64), verify=(0.08, 0.09, 0.18, 0.21, 0.5), draft_level=0.01)


def take_steps(learned, truth, rows, noise=0.0, seed=0):
    """Steps of so many nodes each, which take what the truth says, give or take the noise."""
    chance = random.Random(seed)
    for count in rows:
        learned.took(count, float(truth.verifying(count)) * chance.uniform(1 - noise, 1 + noise))


def test_the_first_step_gives_the_guess_its_unit():
    learned = LearnedCosts()
    take_steps(learned, CLIFF, [1])
    assert learned.verifying([1, 8]) == pytest.approx(0.08 * GUESS.verifying([1, 8]))
    assert learned.draft_level == pytest.approx(0.08 * GUESS.draft_level)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_what_steps_take_is_learned_where_they_were(noise):
    learned, chance = LearnedCosts(), random.Random(1)
    take_steps(learned, CLIFF, [chance.choice([1, 1, 1, 2, 4, 8, 12, 16]) for _ in range(400)], noise)
    for rows in (1, 2, 4, 8, 12, 16):
        assert learned.verifying(rows) == pytest.approx(float(CLIFF.verifying(rows)), rel=0.02 + noise / 2)


def test_a_machine_that_was_measured_is_believed_and_still_corrected():
    learned = LearnedCosts(CLIFF)
    assert learned.verifying([1, 3, 20]) == pytest.approx(CLIFF.verifying([1, 3, 20]))
    slower = Costs(CLIFF.rows, tuple(2 * seconds for seconds in CLIFF.verify), CLIFF.draft_level)
    take_steps(learned, slower, [1])
    assert learned.verifying([1, 3, 20]) == pytest.approx(slower.verifying([1, 3, 20]))


def test_an_outlier_is_forgotten_so_that_it_is_tried_again():
    learned = LearnedCosts()
    take_steps(learned, CLIFF, [1, 1, 1, 8, 8])
    assert learned.took(8, 50 * float(CLIFF.verifying(8))) == pytest.approx(50, rel=0.1)
    dear = float(learned.verifying(8))
    assert dear < 2.1 * float(CLIFF.verifying(8)), "one step says so much and no more"
    take_steps(learned, CLIFF, [1] * 600)
    assert float(learned.verifying(8)) < 0.75 * dear


def test_costs_are_kept_for_the_next_process(tmp_path):
    learned, file = LearnedCosts(), tmp_path / "deep" / "costs.json"
    take_steps(learned, CLIFF, [1, 2, 4, 8] * 50)
    learned.save(file)
    again = LearnedCosts.load(file)
    assert again.verifying([1, 2, 4, 8]) == pytest.approx(learned.verifying([1, 2, 4, 8]))
    assert set(json.loads(file.read_text())["rows"]) <= set(KNOTS.tolist())
    assert LearnedCosts.load(tmp_path / "none.json").verifying(8) == GUESS.verifying(8)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}"),
        '{"rows": [1], "verify": [-1], "draft_level": 1}',
        '{"rows": [3], "verify": [1], "draft_level": 1}',
        '{"rows": [1, 2], "verify": [1], "draft_level": 1}',
        '{"rows": [1], "verify": [NaN], "draft_level": 1}',
        '{"rows": 1, "verify": 1, "draft_level": null}',
    ],
)
def test_damaged_costs_are_ignored_and_said_to_be(content, tmp_path, caplog):
    file = tmp_path / "costs.json"
    file.write_text(content)
    assert LearnedCosts.load(file).verifying(8) == GUESS.verifying(8)
    assert "cannot be read and is ignored" in caplog.text


def test_costs_are_written_now_and_then_and_never_by_a_clock_of_ones_own(tmp_path, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    file = tmp_path / "costs.json"

    def made(clock):
        return Experience(LearnedCosts(), None, Memory(), file, clock)

    learned = made(time.perf_counter)
    learned.save()
    assert not file.exists(), "nothing was learned"
    learned.costs.took(1, 0.5)
    learned.save()
    written = file.read_text()
    learned.costs.took(8, 1.5)
    learned.save()
    assert file.read_text() == written, "just written"
    now[0] += SAVED
    learned.save()
    assert file.read_text() != written
    file.unlink()
    other = made(lambda: 0.0)
    other.costs.took(1, 0.5)
    other.save()
    assert not file.exists()
    monkeypatch.setattr(experience_module.LearnedCosts, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    now[0] += SAVED
    with caplog.at_level("INFO", "recurrent_drafter"):
        learned.save()
    assert "disk full" in caplog.text


def test_each_temperature_is_learned_for_itself_and_a_machine_for_all():
    learned = Experience(LearnedCosts(), DraftShape(3, 10), Memory(5))
    assert learned.controller(0.0) is learned.controller(0.0) is not learned.controller(0.8)
    assert learned.controller(0.0).costs is learned.controller(0.8).costs
    learned.memory.add([1, 2])
    other = learned.afresh(None)
    assert (other.costs, other.longest, other.memory.most) == (learned.costs, None, 5)
    assert other.memory.replies.tokens == []


@pytest.mark.parametrize("most", [0, 1, 7, 20])
def test_a_memory_keeps_the_newest_replies(most):
    memory, said = Memory(most), []
    for number in range(30):
        reply = [number] * (number % 5)
        memory.add(reply)
        said += [*reply, -1]
        kept = memory.replies.tokens
        assert len(kept) <= most
        assert kept == said[len(said) - len(kept) :]
    assert np.all(most == 0 or len(kept) > 0)


def test_without_a_home_nothing_is_kept_and_nothing_breaks(monkeypatch):
    monkeypatch.setenv("RECURRENT_DRAFTER_CACHE", "~nobody-of-that-name/cache")
    assert cache_folder() is None
    learned = LearnedCosts.load(None)
    assert learned.verifying(8) == GUESS.verifying(8)
    kept = Experience(learned, None, Memory(), None)
    learned.took(1, 0.5)
    kept.save()
