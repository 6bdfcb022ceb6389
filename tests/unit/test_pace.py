"""The pace on a simulated machine: a clock that moves as the costs say, and tokens accepted by a coin."""

import random

import numpy as np
import pytest
import torch

import recurrent_drafter.decoding.draft_controller as pace_module
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import prefix_tree, root_tree
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.decoding.draft_controller import AutoPace, Calibration
from recurrent_drafter.decoding.generation_state import Step
from recurrent_drafter.models.config import DraftShape

CHEAP = Costs(rows=(1, 4, 16), verify=(10.0, 11.0, 14.0), draft_level=0.5)
DEAR = Costs(rows=(1, 2, 16), verify=(10.0, 20.0, 160.0), draft_level=1.0)


class Machine:
    """Runs steps of one row: chains of which each token is accepted with ``rate``, and reported as that probable."""

    def __init__(self, costs, monkeypatch, slowdown=1.0):
        self.costs, self.slowdown = costs, slowdown
        self.now, self.coin = 0.0, random.Random(0)
        monkeypatch.setattr(pace_module.time, "perf_counter", lambda: self.now)

    def run(self, pace, rate, steps, batch=1, claimed=None):
        """Total tokens, seconds, and the lengths drafted."""
        tokens, began, lengths = 0, self.now, []
        root = torch.zeros(batch, dtype=torch.int64)
        for _ in range(steps):
            width, length = pace.plan(batch, 100)
            tree = root_tree(root)
            if length:
                tree = self.draft(pace, root, width, length, claimed or max(rate, 1e-3))
            lengths.append(tree.max_depth)
            nodes = tree.tokens.shape[1]
            self.now += self.slowdown * float(self.costs.verifying(np.array([batch * nodes]))[0])
            accepted = [self.accepted(rate, tree, length, row) for row in range(batch)]
            longest = max(accepted) + 1
            path = [self.chain(tree, row)[:longest] for row in range(batch)]
            path = [p[: n + 1] + [p[n]] * (longest - n - 1) for p, n in zip(path, accepted, strict=True)]
            pace.observe(tree, Step(accepted, [[0] * longest] * batch, path))
            tokens += sum(accepted) + batch
        return tokens, self.now - began, lengths

    def draft(self, pace, root, width, length, claimed):
        batch = len(root)
        scores = torch.full((batch, length, width), -20.0)
        scores[:, :, 0] = torch.arange(1, length + 1) * float(np.log(claimed))
        for drafted in range(1, length + 1):
            self.now += self.slowdown * self.costs.draft_level
            if drafted < length and not pace.deeper(scores[:, drafted - 1]):
                length, scores = drafted, scores[:, :drafted]
                break
        beams = Beams(torch.ones(batch, length, width).long(), torch.zeros(batch, length, width).long(), scores)
        return prefix_tree(root, beams, pace.budget(beams))

    def chain(self, tree, row):
        """The best beam's nodes, root first."""
        best = [0]
        for node, (parent, score) in enumerate(
            zip(tree.parents[row].tolist(), tree.log_probs[row].tolist(), strict=True)
        ):
            if node and parent == best[-1] and score > -15:
                best.append(node)
        return best

    def accepted(self, rate, tree, length, row):
        reachable, count = len(self.chain(tree, row)) - 1, 0
        while count < reachable and self.coin.random() < rate:
            count += 1
        return count


def test_costs_are_read_between_and_beyond_what_was_measured():
    assert CHEAP.verifying([1, 2, 4, 10, 16, 20]).tolist() == pytest.approx([10, 10 + 1 / 3, 11, 12.5, 14, 15])


def test_calibration_begins_at_the_drafters_word_and_learns_what_is_true():
    calibration = Calibration()
    claims = np.log([0.97, 0.75, 0.3, 0.02])
    assert np.abs(calibration(claims) - np.exp(claims)).max() < 0.1
    for _ in range(300):
        calibration.update(np.full((1, 10), np.log(0.75)), np.arange(10)[None] < 2)
    assert calibration(np.log(np.array([0.75]))) == pytest.approx(0.2, abs=0.02)
    grid = np.linspace(-12, 0, 200)
    assert (np.diff(calibration(grid)) >= 0).all(), "a child is never more probable than its parent"


@pytest.mark.parametrize("seed", range(20))
def test_budget_is_the_best_of_all_even_where_costs_jump(seed, monkeypatch):
    generator = np.random.default_rng(seed)
    rows = tuple(range(1, 22))
    verify = tuple(np.maximum.accumulate(10 + generator.exponential(1.5, 21) * (generator.random(21) < 0.3) * 5))
    machine = Machine(CHEAP, monkeypatch)
    pace = AutoPace(Costs(rows, verify, 0.3), DraftShape(4, 5))
    length = pace.plan(1, 5)[1] or 5
    machine.now += 0.3 * length
    scores = torch.from_numpy(-np.sort(generator.exponential(2.0, (1, length * 4)), axis=1)).float()
    beams = Beams(torch.zeros(1, length, 4).long(), torch.zeros(1, length, 4).long(), scores.view(1, length, 4))
    gains = np.sort(pace.calibration(scores.double().numpy())[0])[::-1]
    rates = [(1 + gains[: n - 1].sum()) / (verify[n - 1] + 0.3 * length) for n in range(2, length * 4 + 2)]
    assert rates[pace.budget(beams) - 2] == pytest.approx(max(rates))


def test_nothing_accepted_means_autoregression_and_probes_that_cost_little(monkeypatch):
    pace = AutoPace(CHEAP, DraftShape(3, 5))
    machine = Machine(CHEAP, monkeypatch)
    machine.run(pace, 0.0, 50)
    tokens, seconds, lengths = machine.run(pace, 0.0, 2000)
    assert any(lengths), "it goes on asking"
    assert 1 <= seconds / (tokens * 10.0) <= 1.021


def test_what_is_accepted_again_is_drafted_again(monkeypatch):
    pace = AutoPace(CHEAP, DraftShape(3, 5))
    machine = Machine(CHEAP, monkeypatch)
    machine.run(pace, 0.0, 300)
    machine.run(pace, 0.9, 400)
    tokens, seconds, lengths = machine.run(pace, 0.9, 100)
    assert sum(length < 3 for length in lengths) <= 2, "but for a plain step now and then, to compare with"
    assert tokens / seconds > 2.2 / 10.0


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
@pytest.mark.parametrize("slowdown", [1.0, 1.6])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("batch", [1, 8])
def test_close_to_the_best_fixed_length_and_never_slower(rate, costs, slowdown, batch, monkeypatch):
    """On a machine as fast as measured or slower, and where extra nodes are nearly free or pay for themselves only."""
    pace = AutoPace(costs, DraftShape(2, 6))
    machine = Machine(costs, monkeypatch, slowdown)
    machine.run(pace, rate, 60, batch)
    tokens, seconds, _ = machine.run(pace, rate, 300, batch)
    rates = []
    for length in range(7):
        expected = sum(rate**depth for depth in range(length + 1))
        cost = slowdown * (float(costs.verifying(np.array([batch * (length + 1)]))[0]) + length * costs.draft_level)
        rates.append(batch * expected / cost)
    assert tokens / seconds >= 0.97 * rates[0]
    uneven = 1 + pace_module.UNEVEN * np.log2(batch)  # these rows never end, but the pace reckons with the last one
    best = max(rates, key=lambda rate: rate if rate == rates[0] else rate / uneven)
    assert tokens / seconds >= 0.93 * best


def test_a_machine_that_slows_down_is_not_speculation_that_stopped_paying(monkeypatch):
    pace = AutoPace(CHEAP, DraftShape(3, 5))
    machine = Machine(CHEAP, monkeypatch)
    machine.run(pace, 0.7, 300)
    machine.slowdown = 2.0
    _, _, lengths = machine.run(pace, 0.7, 300)
    assert sum(length == 0 for length in lengths) <= 6


@pytest.mark.parametrize("truth", [CHEAP, DEAR])
def test_costs_of_trees_that_were_measured_wrongly_are_found_out(truth, monkeypatch):
    """Verifying more than one node was taken for free, or for dear, and is not."""
    machine = Machine(truth, monkeypatch)
    pace = AutoPace(DEAR if truth is CHEAP else CHEAP, DraftShape(1, 4))
    machine.run(pace, 0.5, 1500)
    tokens, seconds, lengths = machine.run(pace, 0.5, 500)
    if truth is DEAR:
        assert seconds / tokens <= 10.0 * 1.04, "plain decoding"
    else:
        assert tokens / seconds >= 1.3 / 10.0
        assert np.mean(lengths) > 0.9, "one number cannot mend the curve's slope, but speculation pays and is used"


def test_what_one_row_does_says_nothing_about_sixteen(monkeypatch):
    """Each generation begins with 16 rows, where short drafts pay, and ends with one, where long ones do."""
    pace = AutoPace(DEAR, DraftShape(1, 6))
    machine = Machine(DEAR, monkeypatch)
    costs = Costs((1, 16, 32, 48, 96), (10.0, 10.0, 10.5, 20.0, 60.0), 0.5)
    pace.costs = machine.costs = costs
    for _ in range(4):
        _, _, many = machine.run(pace, 0.9, 300, batch=16)
        _, _, one = machine.run(pace, 0.9, 60, batch=1)
    assert 0.8 <= np.mean(many) <= 2
    assert np.mean(one) >= 4


def test_a_drafter_that_boasts_is_soon_known(monkeypatch):
    pace = AutoPace(DEAR, DraftShape(2, 6))
    machine = Machine(DEAR, monkeypatch)
    machine.run(pace, 0.1, 300, claimed=0.95)
    tokens, seconds, _ = machine.run(pace, 0.1, 500, claimed=0.95)
    assert seconds / tokens <= 10.0 * 1.03
