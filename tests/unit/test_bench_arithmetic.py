"""Counters and arithmetic of the benchmarks, with numbers to check by hand."""

import doctest
import math

import pytest
import torch

from recurrent_drafter.bench import engine as engine_module
from recurrent_drafter.bench import workload as workload_module
from recurrent_drafter.bench.columns import CELLS, recorded_rows, run_records, trials_of
from recurrent_drafter.bench.engine import Attainable, acceptance_along, attainable
from recurrent_drafter.bench.long_replies import Soak
from recurrent_drafter.bench.profile import MIB, Profile, TensorCount
from recurrent_drafter.bench.workload import OracleDrafter, all_cells, selected
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.measure import ruler as ruler_module
from recurrent_drafter.measure.arms import AUTO, HF, PLAIN, batches_of
from recurrent_drafter.measure.replies import Reply
from recurrent_drafter.measure.ruler import verdict
from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.records.provenance import read_records, write_records
from recurrent_drafter.report.document import markdown


@pytest.mark.parametrize("module", [engine_module, ruler_module, workload_module])
def test_worked_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_batches_leave_out_what_does_not_fill_one_and_pad_on_the_left():
    batches = batches_of([torch.arange(1, 1 + length) for length in (2, 3, 4)], 2, torch.device("cpu"))
    assert len(batches) == 1
    assert batches[0].input_ids.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert batches[0].prompt(0).tolist() == [1, 2]


COSTS = Costs(rows=(1, 2, 3, 5), verify=(4.0, 5.0, 5.5, 12.0), draft_level=1.0)


def test_attainable_is_the_best_tree_that_the_draft_holds():
    tokens = {1: 1.0, 2: 1.8, 3: 2.4, 5: 2.6}
    found = attainable(COSTS, lambda length, nodes: tokens[nodes], lengths=[1, 2], width=1)
    assert found == Attainable(2.4 * 4 / (5.5 + 2), length=2, nodes=3)  # of one beam, 3 nodes need 2 tokens


def test_attainable_falls_back_to_autoregression():
    assert attainable(COSTS, lambda length, nodes: 1.0, lengths=[1, 2], width=4) == Attainable(1.0, 0, 1)


def oracle(hit_rate: float) -> OracleDrafter:
    return OracleDrafter(RecurrentDraftingConfig(hidden_size=8, vocab_size=11), hit_rate)


def test_oracle_overwrites_slot_0_and_leaves_no_other_one_right():
    drafter = oracle(1.0)
    prompts = torch.tensor([[1, 2], [3, 4]])
    drafter.learn(prompts[0], [5, 6, 7, 8])
    drafter.learn(prompts[1], [9, 10, 0, 1])
    stop = GenerationState(prompts, 4)
    stop.generated, stop.rows = [[5], [9, 10]], [0, 1]
    drafter.follow(stop)
    drafted = torch.tensor([[[0, 6], [7, 0], [8, 8]]]).expand(2, -1, -1)  # (B, L, W), some right by chance
    beams = drafter.overwrite(Beams(drafted, torch.ones_like(drafted), torch.zeros(2, 3, 2)))
    assert beams.tokens.tolist() == [[[6, 7], [7, 0], [8, 9]], [[0, 6], [1, 0], [1, 8]]]  # beyond the reply: its last
    assert beams.parents.eq(0).all()
    tree = prefix_tree(torch.tensor([5, 10]), beams, 7)
    own, parents = tree.log_probs, tree.log_probs.gather(1, tree.parents)
    assert (own <= parents).all()


def test_oracle_log_probabilities_are_honest():
    ladder = oracle(0.6).log_probs(3, 2).exp()
    assert ladder[:, 0].tolist() == pytest.approx([0.6, 0.36, 0.216])
    assert ladder[:, 1].tolist() == pytest.approx([0.04, 0.024, 0.0144])  # 0.4 over the ten other tokens


def test_oracle_hits_are_the_same_again_and_grow_with_the_rate():
    prompt = torch.tensor([1, 2, 3])
    often, seldom = oracle(0.8).hits(prompt, 2000), oracle(0.3).hits(prompt, 2000)
    assert torch.equal(often, oracle(0.8).hits(prompt, 2000))
    assert often[seldom].all()
    assert often.float().mean() == pytest.approx(0.8, abs=0.05)
    assert not oracle(0.0).hits(prompt, 2000).any()


def test_oracle_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="does not know the reply"):
        oracle(0.5).follow(GenerationState(torch.tensor([[1]]), 4))


def test_expected_tokens_of_an_oracle_follow_its_hits(monkeypatch):
    drafter = oracle(0.5)
    monkeypatch.setattr(drafter, "hits", lambda prompt, count: torch.tensor([0, 1, 1, 0, 1, 0, 0], dtype=torch.bool))
    reply = Reply(torch.tensor([1]), torch.arange(7))
    expected = acceptance_along(None, drafter, [reply], DraftShape(1, 4)).tokens_per_step
    # From root 0: two right, then one wrong; from 3: one right; the last token ends it. 6 tokens.
    assert expected(4, 5) == 6 / 3
    assert expected(1, 2) == 6 / 4  # 0 -> 2 -> 3 -> 5 -> 6
    assert expected(4, 2) == expected(1, 5) == expected(1, 2)


def test_cells_vary_one_factor_each():
    cells = all_cells(["demo"], "bfloat16")
    base = cells[0]
    factors = ("dtype", "batch", "context", "temperature")
    assert all(sum(getattr(cell, name) != getattr(base, name) for name in factors) == 1 for cell in cells[1:])
    assert len({cell.name for cell in cells}) == len(cells) == 11
    assert [cell.batch for cell in selected(cells, ["demo/batch-*"])] == [2, 4, 8, 16]
    with pytest.raises(ValueError, match="no cell matches"):
        selected(cells, ["demo/nothing"])


def test_rows_are_computed_from_the_written_lines(tmp_path):
    def run(arm, seconds, steps, **more):
        return {"kind": "run", "arm": arm, "prompt": 0, "tokens": [9], "steps": steps, "seconds": seconds,
                "first_seconds": 1.0, "outcome": ["identical"], **more}  # fmt: skip

    records = [
        {"kind": "cell", "name": "x"},
        run(HF, 10.0, None),
        run(PLAIN, 9.0, 8),
        run("fixed 10x4", 5.0, 2),
        run(AUTO, 3.0, 2, outcome=["tie"]),
        {"kind": "limit", "arm": AUTO, "speedup": 5.0},
    ]
    path = tmp_path / "x.jsonl"
    assert write_records(path, iter(records)) == read_records(path) == records
    rows = {row.arm: row for row in recorded_rows(read_records(path))}
    auto = rows[AUTO]
    assert auto.over(PLAIN).value == 3.0
    assert auto.decoding.value == (8 / 2) / (8 / 8)
    assert auto.tokens_per_step == 4.0
    assert auto.efficiency == 1.0
    assert auto.fraction == 4 / 5
    assert auto.over_best_fixed.value == pytest.approx(5 / 3)
    assert verdict(auto.verdicts) == "ties: 1"
    assert math.isnan(rows[HF].tokens_per_step)
    # one prompt: no interval
    assert "| x | auto | 3.0 | 4.00 | 3.33 | 3.00 | 4.00 |" in markdown(rows.values(), CELLS)


def test_trials_come_back_from_their_lines():
    def run(arm, number, seconds, outcome):
        return {"kind": "run", "arm": arm, "prompt": number, "tokens": [9, 4], "steps": 8, "seconds": seconds,
                "first_seconds": 1.0, "outcome": outcome, "margins": [None, 0.1]}  # fmt: skip

    lines = [run(arm, number, 2.0 + number, ["identical", "tie"]) for arm in (PLAIN, AUTO) for number in (0, 1)]
    assert list(run_records(trials_of(lines))) == lines


def test_a_row_knows_its_faster_baseline_and_whose_tokens_they_are():
    def run(arm, seconds, **more):
        return {"kind": "run", "arm": arm, "prompt": 0, "tokens": [8], "steps": 4, "seconds": seconds,
                "first_seconds": 0.5, "outcome": ["identical"], "margins": [None], **more}  # fmt: skip

    seen = {"sources": [[0, 1, 1, 0, 2, 0, 2, 2]], "drafts": [[(3, 2), (3, 1), (2, 2), (0, 0)]]}
    for plain, faster in ((3.0, PLAIN), (5.0, HF)):
        rows = {row.arm: row for row in recorded_rows([run(HF, 4.0), run(PLAIN, plain), run(AUTO, 2.0, **seen)])}
        assert {row.base for row in rows.values()} == {faster}
        assert rows[AUTO].over(rows[AUTO].base).value == min(plain, 4.0) / 2
    assert [rows[AUTO].share(source) for source in (0, 1, 2)] == [3 / 8, 2 / 8, 3 / 8]
    assert rows[AUTO].accepted_from(1) == [1 / 3, 1 / 3, 0, 0], "the first of three steps with a draft"
    assert rows[AUTO].accepted_from(2) == [2 / 3, 1 / 3, 0, 0]
    assert math.isnan(rows[HF].share(0)) and rows[HF].accepted_from(2) == [] and rows[AUTO].first_seconds == 0.5


def test_profile_shares():
    profile = Profile(steps=2, total=1.0)
    profile.seconds |= {"verify": 0.6, "draft": 0.3}
    assert profile.overhead == pytest.approx(0.1)
    assert profile.rows[0] == ("verify", 300.0, 0.6)
    name, milliseconds, share = profile.rows[-1]
    assert (name, round(milliseconds), round(share, 3)) == ("other", 50, 0.1)


def test_tensors_are_counted_while_they_live():
    with TensorCount() as count:
        first = torch.zeros(1000)
        second = first + 1
        first.view(10, 100).mul_(2)  # nothing new
        del first
        third = second * 2
        del second, third
    assert count.peak == 8000
    assert count.held == 0


def test_soak_compares_the_last_fifth_with_the_second():
    sizes = [mebibytes * MIB for mebibytes in (50, 100, 100, 100, 104)]
    found = Soak(10, [9.0, 2.0, 2.0, 2.0, 3.0], sizes).summary()
    assert found["time_growth"] == 1.5
    assert found["memory_growth_mib"] == 4
