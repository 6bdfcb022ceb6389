"""Controllers on simulated machines: a clock that moves as the costs say, and tokens accepted by a coin."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import LOOKUP, prefix_tree, root_tree
from recurrent_drafter.decoding.costs import Costs, LearnedCosts
from recurrent_drafter.decoding.draft_controller import UNEVEN, ChainController, TreeController
from recurrent_drafter.decoding.generation_state import Step
from recurrent_drafter.decoding.lookup import Chains, Found
from recurrent_drafter.decoding.rates import AcceptanceByClaim, AcceptanceByDepth, LengthChoice
from recurrent_drafter.models.config import DraftShape

CHEAP = Costs(rows=(1, 4, 16), verify=(10.0, 11.0, 14.0), draft_level=0.5)
DEAR = Costs(rows=(1, 2, 16), verify=(10.0, 20.0, 160.0), draft_level=1.0)


class Machine:
    """Runs steps of one row: chains of which each token is accepted with ``rate``, and reported as that probable."""

    def __init__(self, costs, slowdown=1.0, device="cpu"):
        self.costs, self.slowdown, self.device = costs, slowdown, device
        self.now, self.coin = 0.0, random.Random(0)

    def clock(self):
        return self.now

    def run(self, controller, rate, steps, batch=1, claimed=None):
        """Total tokens, seconds, and the lengths drafted."""
        tokens, began, lengths = 0, self.now, []
        root = torch.zeros(batch, dtype=torch.int64)
        for _ in range(steps):
            width, length = controller.plan(batch, 100)
            tree = root_tree(root)
            if length:
                tree = self.draft(controller, root, width, length, claimed or max(rate, 1e-3))
            lengths.append(tree.max_depth)
            nodes = tree.tokens.shape[1]
            self.now += self.slowdown * float(self.costs.verifying(np.array([batch * nodes]))[0])
            accepted = [self.accepted(rate, tree, length, row) for row in range(batch)]
            longest = max(accepted) + 1
            path = [self.chain(tree, row)[:longest] for row in range(batch)]
            path = [p[: n + 1] + [p[n]] * (longest - n - 1) for p, n in zip(path, accepted, strict=True)]
            step = Step(
                accepted, [[0] * longest] * batch, path, tree.max_depth, tree.log_probs.numpy(), tree.sources.numpy()
            )
            controller.observe(step)
            tokens += sum(accepted) + batch
        return tokens, self.now - began, lengths

    def draft(self, controller, root, width, length, claimed):
        batch = len(root)
        scores = torch.full((batch, length, width), -20.0)
        scores[:, :, 0] = torch.arange(1, length + 1) * float(np.log(claimed))
        for drafted in range(1, length + 1):
            self.now += self.slowdown * self.costs.draft_level
            if drafted < length and not controller.deeper(scores[:, drafted - 1].to(self.device)):
                length, scores = drafted, scores[:, :drafted]
                break
        beams = Beams(torch.ones(batch, length, width).long(), torch.zeros(batch, length, width).long(), scores)
        return prefix_tree(root, beams, controller.budget(scores.flatten(1).to(self.device), length))

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
    calibration = AcceptanceByClaim()
    claims = np.log([0.97, 0.75, 0.3, 0.02])
    assert np.abs(calibration(claims) - np.exp(claims)).max() < 0.1
    for _ in range(300):
        calibration.verified(np.full((1, 10), np.log(0.75)), np.arange(10)[None] < 2)
    assert calibration(np.log(np.array([0.75]))) == pytest.approx(0.2, abs=0.02)
    grid = np.linspace(-12, 0, 200)
    assert (np.diff(calibration(grid)) >= 0).all(), "a child is never more probable than its parent"


@pytest.mark.parametrize("seed", range(20))
def test_budget_is_the_best_of_all_even_where_costs_jump(seed):
    generator = np.random.default_rng(seed)
    rows = tuple(range(1, 22))
    verify = tuple(np.maximum.accumulate(10 + generator.exponential(1.5, 21) * (generator.random(21) < 0.3) * 5))
    machine = Machine(CHEAP)
    controller = TreeController(Costs(rows, verify, 0.3), DraftShape(4, 5), machine.clock)
    length = controller.plan(1, 5)[1] or 5
    machine.now += 0.3 * length
    scores = torch.from_numpy(-np.sort(generator.exponential(2.0, (1, length * 4)), axis=1)).float()
    gains = np.sort(AcceptanceByClaim()(scores.double().numpy())[0])[::-1]
    rates = [(1 + gains[: n - 1].sum()) / (verify[n - 1] + 0.3 * length) for n in range(2, length * 4 + 2)]
    assert rates[controller.budget(scores, length) - 2] == pytest.approx(max(rates))


def test_nothing_accepted_means_autoregression_and_probes_that_cost_little():
    machine = Machine(CHEAP)
    controller = TreeController(CHEAP, DraftShape(3, 5), machine.clock)
    machine.run(controller, 0.0, 50)
    tokens, seconds, lengths = machine.run(controller, 0.0, 2000)
    assert any(lengths), "it goes on asking"
    assert 1 <= seconds / (tokens * 10.0) <= 1.021


def test_what_is_accepted_again_is_drafted_again():
    machine = Machine(CHEAP)
    controller = TreeController(CHEAP, DraftShape(3, 5), machine.clock)
    machine.run(controller, 0.0, 300)
    machine.run(controller, 0.9, 400)
    tokens, seconds, lengths = machine.run(controller, 0.9, 100)
    assert sum(length < 3 for length in lengths) <= 2, "but for a plain step now and then, to compare with"
    assert tokens / seconds > 2.2 / 10.0


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
@pytest.mark.parametrize("slowdown", [1.0, 1.6])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("batch", [1, 8])
def test_close_to_the_best_fixed_length_and_never_slower(rate, costs, slowdown, batch):
    """On a machine as fast as measured or slower, and where extra nodes are nearly free or pay for themselves only."""
    machine = Machine(costs, slowdown)
    controller = TreeController(costs, DraftShape(2, 6), machine.clock)
    machine.run(controller, rate, 60, batch)
    tokens, seconds, _ = machine.run(controller, rate, 300, batch)
    rates = []
    for length in range(7):
        expected = sum(rate**depth for depth in range(length + 1))
        cost = slowdown * (float(costs.verifying(np.array([batch * (length + 1)]))[0]) + length * costs.draft_level)
        rates.append(batch * expected / cost)
    assert tokens / seconds >= 0.97 * rates[0]
    uneven = 1 + UNEVEN * np.log2(batch)  # these rows never end, but the controller reckons with the last one
    best = max(rates, key=lambda rate: rate if rate == rates[0] else rate / uneven)
    assert tokens / seconds >= 0.93 * best


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_on_an_accelerator_no_draft_is_looked_at(rate, costs):
    """Tensors without data stand for those that it would take a wait to read."""
    machine = Machine(costs, device="meta")
    controller = TreeController(costs, DraftShape(2, 6), machine.clock)
    machine.run(controller, rate, 100)
    tokens, seconds, _ = machine.run(controller, rate, 300)
    rates = []
    for length in range(7):
        seconds_of = float(costs.verifying(length + 1)) + length * costs.draft_level
        rates.append(sum(rate**depth for depth in range(length + 1)) / seconds_of)
    assert tokens / seconds >= 0.97 * rates[0]
    assert tokens / seconds >= 0.85 * max(rates)


def test_a_machine_that_slows_down_is_not_speculation_that_stopped_paying():
    machine = Machine(CHEAP)
    controller = TreeController(CHEAP, DraftShape(3, 5), machine.clock)
    machine.run(controller, 0.7, 300)
    machine.slowdown = 2.0
    _, _, lengths = machine.run(controller, 0.7, 300)
    assert sum(length == 0 for length in lengths) <= 6


@pytest.mark.parametrize("truth", [CHEAP, DEAR])
def test_costs_of_trees_that_were_measured_wrongly_are_found_out(truth):
    """Verifying more than one node was taken for free, or for dear, and is not."""
    machine = Machine(truth)
    controller = TreeController(DEAR if truth is CHEAP else CHEAP, DraftShape(1, 4), machine.clock)
    machine.run(controller, 0.5, 1500)
    tokens, seconds, lengths = machine.run(controller, 0.5, 500)
    if truth is DEAR:
        assert seconds / tokens <= 10.0 * 1.04, "plain decoding"
    else:
        assert tokens / seconds >= 1.3 / 10.0
        assert np.mean(lengths) > 0.9, "one number cannot mend the curve's slope, but speculation pays and is used"


def test_what_one_row_does_says_nothing_about_sixteen():
    """Each generation begins with 16 rows, where short drafts pay, and ends with one, where long ones do."""
    machine = Machine(DEAR)
    controller = TreeController(DEAR, DraftShape(1, 6), machine.clock)
    costs = Costs((1, 16, 32, 48, 96), (10.0, 10.0, 10.5, 20.0, 60.0), 0.5)
    machine.costs = costs
    controller.costs = LearnedCosts(costs)
    for _ in range(4):
        _, _, many = machine.run(controller, 0.9, 300, batch=16)
        _, _, one = machine.run(controller, 0.9, 60, batch=1)
    assert 0.8 <= np.mean(many) <= 2
    assert np.mean(one) >= 4


def test_a_drafter_that_boasts_is_soon_known():
    machine = Machine(DEAR)
    controller = TreeController(DEAR, DraftShape(2, 6), machine.clock)
    machine.run(controller, 0.1, 300, claimed=0.95)
    tokens, seconds, _ = machine.run(controller, 0.1, 500, claimed=0.95)
    assert seconds / tokens <= 10.0 * 1.03


def test_steps_of_one_length_tell_of_the_machine_and_of_two_compare():
    choice = LengthChoice((4, 0), slowness=1.0)
    choice.took(0, 1.0)
    choice.took(0, 2.0)  # after one of the same length: the machine is slower, for drafts too
    assert choice.slowness[0] == choice.slowness[4] == pytest.approx(1.05)
    other = choice.afresh()
    other.took(4, 2.1)  # after another length: drafts are dear
    assert other.slowness[0] == pytest.approx(1.05) and other.slowness[4] == pytest.approx(1.3125)
    assert choice.slowness[4] == pytest.approx(1.05), "another load is another matter"


class Engine:
    """Steps whose time depends on the draft's length; 0 to 4 tokens of a draft are accepted. ``now`` is its clock."""

    TOKENS = {0: 1.0, 2: 1 + 4 / 5 + 3 / 5, 4: 1 + 4 / 5 + 3 / 5 + 2 / 5 + 1 / 5}  # per request and step

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.now, self.taken = seconds, 0.0, Counter()
        self.length, self.noise = 0, random.Random(1)

    def run(self, controller: ChainController, rows: int, steps: int) -> Counter:
        self.taken = Counter()
        for _ in range(steps):
            accepted = [min(self.length, self.noise.randint(0, 4)) for _ in range(rows)]
            self.length = controller.plan([self.length] * rows, [1 + n for n in accepted], alone=True)
            self.now += self.seconds[self.length] * self.noise.uniform(0.8, 1.25)
            self.taken[self.length] += 1
        return self.taken


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({0: 1.0, 2: 1.4, 4: 1.5}, 4),  # verifying many costs about as much as one
        ({0: 1.0, 2: 1.4, 4: 3.0}, 2),
        ({0: 1.0, 2: 3.5, 4: 5.0}, 0),
    ],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_the_length_that_pays_is_drafted(seconds, best, rows):
    engine = Engine(seconds)
    controller = ChainController(4, clock=lambda: engine.now)
    taken = engine.run(controller, rows, steps=4000)
    assert taken[best] > 0.94 * 4000
    yielded = sum(engine.TOKENS[length] * count for length, count in taken.items())
    assert yielded / engine.now > 0.97 * engine.TOKENS[best] / (seconds[best] * 1.025)  # the noise's mean


def test_each_load_is_judged_for_itself_and_again():
    engine = Engine({0: 1.0, 2: 1.2, 4: 1.3})
    controller = ChainController(4, clock=lambda: engine.now)
    engine.run(controller, rows=1, steps=100)
    engine.seconds = {0: 1.0, 2: 4.0, 4: 8.0}  # what a step costs with many rows
    engine.run(controller, rows=16, steps=100)
    assert engine.run(controller, rows=16, steps=50) == {0: 50}
    engine.seconds = {0: 1.0, 2: 1.2, 4: 1.3}
    assert engine.run(controller, rows=1, steps=50)[4] >= 40
    engine.run(controller, rows=16, steps=6000)  # it has become cheap, which trials find
    assert engine.run(controller, rows=16, steps=100)[4] > 90


def test_steps_that_did_other_things_are_not_timed():
    engine = Engine({0: 1.0, 2: 1.0, 4: 1.0})
    controller = ChainController(4, clock=lambda: engine.now)
    engine.run(controller, rows=2, steps=50)
    for _ in range(20):
        engine.now += 1000  # a long prompt is read
        engine.length = controller.plan([engine.length] * 2, [1, 1], alone=False)
    assert engine.run(controller, rows=2, steps=50)[4] > 40


def test_acceptance_by_position():
    acceptance = AcceptanceByDepth(3)
    for _ in range(500):
        acceptance.verified([3] * 4, [0, 1, 2, 3])
    assert acceptance.tokens[0] == 1
    assert acceptance.tokens[3] == pytest.approx(1 + 3 / 4 + 2 / 4 + 1 / 4, rel=0.01)
    for _ in range(1000):
        acceptance.verified([1, 1, 0], [0, 0, 0])  # drafts of one token say nothing of the second
    assert acceptance.tokens[1] < 1.45
    assert (acceptance.tokens[2] - acceptance.tokens[1]) / (acceptance.tokens[1] - 1) == pytest.approx(2 / 3, rel=0.01)


def traced(controller, now, steps=240):
    """What is decided over a made-up trace of steps, whose times, acceptances and claims are drawn once and for all."""
    chance, decided = random.Random(5), []
    for number in range(steps):
        batch = 1 + number // 40
        width, length = controller.plan(batch, 50)
        tree = root_tree(torch.zeros(batch, dtype=torch.int64))
        if length:
            scores = -torch.tensor([[chance.expovariate(2.0) for _ in range(length * width)] for _ in range(batch)])
            scores = scores.sort(descending=True).values.view(batch, length, width)
            drafted = next((n for n in range(1, length) if not controller.deeper(scores[:, n - 1])), length)
            now[0] += 0.4 * drafted
            tokens = torch.ones(batch, drafted, width, dtype=torch.int64)
            beams = Beams(tokens, torch.zeros_like(tokens), scores[:, :drafted])
            tree = prefix_tree(tree.tokens[:, 0], beams, controller.budget(beams.log_probs.flatten(1), drafted))
        nodes = tree.tokens.shape[1]
        accepted = [chance.randint(0, min(1, tree.max_depth)) for _ in range(batch)]
        now[0] += 10 + 0.5 * nodes * chance.uniform(0.8, 1.25)
        path = [[0] * 2 if n == 0 else [0, 1] for n in accepted]
        controller.observe(
            Step(accepted, [[0, 0]] * batch, path, tree.max_depth, tree.log_probs.numpy(), tree.sources.numpy())
        )
        decided.append((width, length, tree.max_depth, nodes))
    return decided


def test_under_a_fixed_clock_decisions_are_a_function_of_what_was_observed():
    runs = []
    for _ in range(2):
        now = [0.0]
        runs.append(traced(TreeController(CHEAP, DraftShape(3, 5), lambda now=now: now[0]), now))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 5, "decisions vary"
    chains = []
    for _ in range(2):
        engine = Engine({0: 1.0, 2: 1.4, 4: 1.9})
        controller = ChainController(4, clock=lambda engine=engine: engine.now)
        chains.append([engine.run(controller, rows, steps=60) for rows in (1, 4, 1, 16)])
    assert chains[0] == chains[1]


def chains(*probabilities):
    """One row of lookup: a chain whose tokens are accepted so often, one after the other."""
    nodes, reached = Chains(), 1.0
    for depth, probability in enumerate(probabilities, 1):
        reached *= probability
        nodes.add(token=1, parent=depth - 1, depth=depth, probability=reached)
    return Found([nodes])


def look_up(controller, machine, rate, steps, length=8):
    """Lookup finds a chain at every step, each token of which is accepted with ``rate``, as is expected of it."""
    tokens, began, verified = 0, machine.now, []
    for _ in range(steps):
        assert controller.plan(1, 100, found := chains(*[rate] * length)) == (1, 0), "there is no drafter"
        claims = controller.claims(found.probabilities)
        nodes = 1 if claims is None else controller.budget(torch.from_numpy(claims), 0)
        machine.now += machine.slowdown * float(machine.costs.verifying(nodes))
        accepted = 0
        while accepted < nodes - 1 and machine.coin.random() < rate:
            accepted += 1
        claimed, sources = np.zeros((1, nodes), np.float32), np.full((1, nodes), LOOKUP)
        controller.observe(Step([accepted], [[0]], [list(range(accepted + 1))], nodes - 1, claimed, sources))
        tokens, verified = tokens + accepted + 1, [*verified, nodes]
    return tokens, machine.now - began, verified


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.6, 0.9])
def test_lookup_alone_is_never_slower_and_close_to_the_best_without_knowing_the_machine(rate, costs):
    machine = Machine(costs)
    controller = TreeController(LearnedCosts(), None, machine.clock)
    look_up(controller, machine, rate, 100)
    tokens, seconds, _ = look_up(controller, machine, rate, 1000)
    rates = []
    for length in range(9):
        expected = sum(rate**depth for depth in range(length + 1))
        rates.append(expected / float(costs.verifying(length + 1)))
    assert tokens / seconds >= 0.97 * rates[0]
    assert tokens / seconds >= 0.9 * max(rates)


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_the_first_reply_loses_little_to_learning_what_steps_take(costs):
    machine = Machine(costs)
    tokens, seconds, _ = look_up(TreeController(LearnedCosts(), None, machine.clock), machine, 0.25, 100)
    assert seconds / tokens <= 1.1 * float(costs.verifying(1))


def test_lookup_that_is_sure_leaves_the_drafter_out():
    machine = Machine(CHEAP)
    controller = TreeController(CHEAP, DraftShape(2, 6), machine.clock)
    machine.run(controller, 0.6, 200)
    drafted = []
    for number in range(400):
        sure = number % 2 == 0
        found = chains(*[0.97] * 10) if sure else None
        _, length = controller.plan(1, 100, found)
        drafted.append((sure, length > 0))
        tree = root_tree(torch.zeros(1, dtype=torch.int64))
        if length:
            tree = machine.draft(controller, tree.tokens[:, 0], 2, length, 0.6)
            nodes, accepted = tree.tokens.shape[1], machine.accepted(0.6, tree, length, 0)
            path = [machine.chain(tree, 0)[: accepted + 1]]
            claims, sources = tree.log_probs.numpy(), tree.sources.numpy()
        else:
            nodes = 1 if found is None else controller.budget(torch.from_numpy(found.probabilities), 0)
            accepted, path = nodes - 1, [list(range(nodes))]
            claims, sources = np.zeros((1, nodes), np.float32), np.full((1, nodes), LOOKUP)
        machine.now += float(CHEAP.verifying(nodes))
        controller.observe(Step([accepted], [[0]], path, tree.max_depth, claims, sources))
    drafted = drafted[100:]
    assert np.mean([was for sure, was in drafted if sure]) < 0.05
    assert np.mean([was for sure, was in drafted if not sure]) > 0.9


def test_found_nodes_rank_among_drafted_ones_by_measured_acceptance():
    """A drafter that boasts claims more than lookup, which is expected to be right as often as it says."""
    machine = Machine(CHEAP)
    controller = TreeController(CHEAP, DraftShape(2, 6), machine.clock)
    machine.run(controller, 0.3, 300, claimed=0.95)
    found = chains(0.8, 0.9)
    while controller.plan(1, 100, found)[1] == 0:
        machine.now += 10.0
        controller.observe(Step([0], [[0]], [[0]], 0, np.zeros((1, 1), np.float32), np.zeros((1, 1), int)))
    claims = controller.claims(found.probabilities)
    assert claims is not None
    assert claims[0, 0] > np.log(0.95), "more than a node of the drafter that is accepted less"
    assert claims[0, 0] >= claims[0, 1]
