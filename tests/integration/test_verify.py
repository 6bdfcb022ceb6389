"""`verify` finds what is broken, and calls a tie a tie."""

import dataclasses
import json

import pytest
import torch
from models import VOCABULARY, generate, prompts, random_drafter, tiny_model
from transformers import LogitsProcessor, TopKLogitsWarper

import recurrent_drafter.cli.measuring as command
import recurrent_drafter.decoding.decode as decode_module
import recurrent_drafter.measure.divergence as verify_module
from recurrent_drafter import DraftShape, RecurrentDraftingSpeculator
from recurrent_drafter.cli.main import launch
from recurrent_drafter.core.noise import draw_tokens, gumbel_noise
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.measure import arms
from recurrent_drafter.measure.arms import Batch, Decoding, at_temperature, explaining, hf_arm, our_arm
from recurrent_drafter.measure.divergence import TREES, Draw, first_divergence, ways_of_computing
from recurrent_drafter.measure.ruler import BUG, IDENTICAL, judge
from recurrent_drafter.models.verifier import Verifier, VerifierSession

FEW = ["--base_model", "demo", "--dtype", "float32", "--prompts", "3", "--new_tokens", "10", "--batch_size", "2"]


def test_honest_run(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert launch("verify", [*FEW, "--auto", "--output_file", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {row["verdict"] for row in found["rows"]} == {"identical"}
    assert len(found["rows"]) == 3 * (5 + 2)  # greedy: three ways against two references; sampled: two against one
    assert found["settings"]["sampled"]["temperature"] == 0.8
    assert "BUG" in capsys.readouterr().out  # the column's head


def accept_first_child(monkeypatch):
    """A step takes whatever stands first in the tree for the verifier's own token."""
    follow = decode_module.follow_tree

    def broken(tree, draw):
        def first_child(node):
            is_child = tree.parents == node[:, None]
            is_child[:, 0] = False
            has, child = is_child.max(1)
            return torch.where(has, tree.tokens.gather(1, child[:, None])[:, 0], draw(node))

        return follow(tree, first_child)

    monkeypatch.setattr(decode_module, "follow_tree", broken)


def shift_positions(monkeypatch):
    """Draft tokens are verified one position further on than they stand."""
    forward = VerifierSession.forward_tree

    def broken(session, tree):
        return forward(session, dataclasses.replace(tree, depths=tree.depths + (tree.depths > 0)))

    monkeypatch.setattr(VerifierSession, "forward_tree", broken)


def shift_noise(monkeypatch):
    """Below a draft the noise of the next place is drawn with."""
    draws = Sampler.draws

    def broken(sampler, tree, logits):
        shifted = dataclasses.replace(tree, depths=tree.depths + 1) if tree.max_depth else tree
        return draws(sampler, shifted, logits)

    monkeypatch.setattr(Sampler, "draws", broken)


@pytest.mark.parametrize("fault", [accept_first_child, shift_positions, shift_noise])
def test_what_is_broken_is_a_bug(fault, monkeypatch, capsys):
    fault(monkeypatch)
    assert launch("verify", FEW) == 1
    assert ": BUG (margin" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_said_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_verifier", lambda *_, **__: pytest.fail("the run has begun"))
    for file in (tmp_path / "none" / "found.json", tmp_path):
        assert launch("verify", [*FEW, "--output_file", str(file)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: ") for line in errors)


class Raise(LogitsProcessor):
    """Puts tokens where they are wanted."""

    def __init__(self, scores: dict[int, float]):
        self.scores = scores

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for token, score in self.scores.items():
            scores[:, token] = score
        return scores


def noise(seed, row, position, token):
    return float(gumbel_noise(seed, *(torch.tensor([x]) for x in (row, position, token))))


@pytest.mark.parametrize(("by", "is_tie"), [(0.0, True), (0.01, False)])
def test_a_sampled_tie_is_one_of_noised_scores(by, is_tie):
    """Two tokens far apart in probability, and as far apart in noise: at their own place they are level."""
    verifier, prompt = Verifier(tiny_model("gpt2")), prompts(1)[0][0]
    reply = [4, 9, 2]
    first, second = (50.0 - noise(7, 3, 3, token) for token in (11, 12))
    draw = Draw(prompt, (Raise({11: first, 12: second + by}),), seed=7, row_id=3)
    found = first_divergence(verifier, prompt, [*reply, 11], [*reply, 12], draw)
    assert (found.position, found.is_tie) == (3, is_tie)
    assert found.margin == pytest.approx(by, abs=1e-5)
    assert found.verdict.startswith("numeric tie (margin" if is_tie else "BUG")
    elsewhere = dataclasses.replace(draw, row_id=4)
    assert not first_divergence(verifier, prompt, [*reply, 11], [*reply, 12], elsewhere).is_tie


@pytest.mark.parametrize(
    ("one_row", "tree", "is_tie"),
    [
        (1.0 - 1e-5, 1.0 + 1e-5, True),  # the other pass keeps it
        (1.0 - 1e-5, 1.0 - 1e-5, True),  # neither does, but a nudge within the tolerance would
        (0.5, 0.5, False),
        (0.5, 1.0 + 1e-5, False),  # the other pass keeps it, but no rounding moves a score by a half
    ],
)
def test_a_tie_at_the_edge_of_top_k(one_row, tree, is_tie, monkeypatch):
    """Token 12 was drawn, but stands just below, or far below, the two that top-k keeps."""
    verifier, prompt = Verifier(tiny_model("gpt2")), prompts(1)[0][0]
    ways = []
    for nudge, third in ((0.0, one_row), (1e-4, tree)):
        ways.append(torch.full((VOCABULARY,), -50.0))
        ways[-1][torch.tensor([10, 11, 12])] = torch.tensor([3.0 + nudge, 1.0, third])
    monkeypatch.setattr(verify_module, "ways_of_computing", lambda verifier, prompt, reply: [w.clone() for w in ways])
    seed = next(s for s in range(10_000) if noise(s, 0, 0, 12) > 4 + max(noise(s, 0, 0, token) for token in (10, 11)))
    draw = Draw(prompt, (TopKLogitsWarper(2),), seed=seed)
    for expected, found in ((10, 12), (11, 12)):
        assert first_divergence(verifier, prompt, [expected], [found], draw).is_tie is is_tie


def test_equal_weights_make_a_greedy_tie():
    model = tiny_model("gpt2")
    ids, mask = prompts(1)
    expected = generate(model, ids, mask)[0, 12:].tolist()
    twin = (expected[4] + 1) % VOCABULARY
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[expected[4]]
    found = first_divergence(Verifier(model), ids[0], expected, [*expected[:4], twin])
    assert (found.position, found.is_tie) == (4, True)


def test_processors_are_the_ones_generate_would_use():
    """A reply under a repetition penalty, broken by hand: judged by the penalized scores."""
    model = tiny_model("llama")
    verifier = Verifier(model)
    batch = Batch(*prompts(2), range(2))
    decoding = Decoding(12, sampling={"do_sample": False, "repetition_penalty": 1.5})
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(3, 3))
    speculator.attach_verifier(model)
    explain = explaining(verifier, decoding)(batch)
    reference = hf_arm("HF", model, decoding).run(batch)
    assert [row[:12] for row in reference.ids] == generate(
        model, batch.input_ids, batch.attention_mask, new=12, repetition_penalty=1.5
    )[:, 12:].tolist()
    ours = our_arm("ours", speculator, decoding).run(batch)
    assert {found.outcome for found in judge(ours, reference, explain)} == {IDENTICAL}
    broken = dataclasses.replace(ours, ids=[[*row[:5], 0] for row in reference.ids])
    assert {found.outcome for found in judge(broken, reference, explain)} == {BUG}


def test_the_draw_that_explains_a_sampled_difference_is_the_one_that_was_made(monkeypatch):
    draws, log_probs = [], torch.randn(50).log_softmax(-1)
    monkeypatch.setattr(
        arms, "first_divergence", lambda verifier, prompt, expected, found, draw, ways: draws.append(draw)
    )
    batch = Batch(torch.ones(2, 3).long(), torch.ones(2, 3).long(), row_ids=[8, 9])
    decoding = Decoding(8, sampling=at_temperature(0.7), seed=3)
    explaining(Verifier(tiny_model("gpt2")), decoding)(batch)(1, [1], [2])
    (draw,) = draws
    drawn = draw_tokens((log_probs / 0.7)[None], 3, torch.tensor([9]), torch.tensor([6]))
    scores = draw.noised(6, draw.scores([0] * 6, log_probs), torch.arange(50))
    assert max(range(50), key=scores.__getitem__) == drawn[0]


def test_ways_of_computing_differ_by_rounding_alone_whatever_is_wrong_with_drafts(monkeypatch):
    """What a tie is measured by: the same place read row by row, and as the root of trees; below it nothing is kept."""
    verifier, prompt = Verifier(tiny_model("llama")), prompts(1)[0][0]
    ways = ways_of_computing(verifier, prompt, [4, 9, 2] * 15)
    whole = torch.cat([prompt, torch.tensor([4, 9, 2] * 15)])[None]
    with torch.inference_mode():
        expected = verifier.model(whole).logits[0, -1]
    assert len(ways) == 1 + len(TREES)
    for way in ways:
        torch.testing.assert_close(way, expected, atol=1e-4, rtol=1e-4)
    shift_positions(monkeypatch)
    for way, broken in zip(ways, ways_of_computing(verifier, prompt, [4, 9, 2] * 15), strict=True):
        assert torch.equal(way, broken), "a fault must not widen what counts as a tie"
