"""Several texts at once, and targets that are drawn: their law, and what the noise depends on."""

import itertools

import pytest
import torch
from models import generate, tiny_model
from runs import texts

from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.distillation import TokenDraw, distil, distilled_targets


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-window"])
@pytest.mark.parametrize("chunk", [5, 60, 1000])
def test_texts_that_share_passes_get_what_generate_gives(name, chunk):
    model = tiny_model(name)
    examples = [example.input_ids for example in texts(5)]
    roots = [torch.arange(1, len(ids), 1 + number % 3) for number, ids in enumerate(examples)]
    roots[2] = roots[2][:0]  # a text without roots
    for ids, own, targets in zip(
        examples, roots, distil(Verifier(model), examples, roots, 3, (), chunk=chunk), strict=True
    ):
        assert targets.shape == (len(own), 3)
        for position, row in zip(own.tolist(), targets, strict=True):
            prefix = ids[None, : position + 1]
            assert row.tolist() == generate(model, prefix, torch.ones_like(prefix), new=3)[0, -3:].tolist()


def test_nothing_is_asked_of_the_model_beyond_its_context():
    model = tiny_model("gpt2", n_positions=16)
    ids = torch.arange(1, 17)
    targets = distilled_targets(Verifier(model), ids, torch.ones(16, dtype=torch.bool), 3, ())
    assert [(row == IGNORED).sum().item() for row in targets[-4:]] == [0, 0, 1, 2]
    prefix = ids[None, :14]
    assert targets[13].tolist() == generate(model, prefix, torch.ones_like(prefix), new=3)[0, 14:].tolist()


@torch.inference_mode()
def test_drawn_targets_follow_the_verifiers_law():
    """Chi-square of 4,000 continuations against the law of all 5 x 5, at two roots at once."""
    model = tiny_model("gpt2", vocab_size=5)
    verifier, temperature, count = Verifier(model), 6.0, 4000
    ids, roots = torch.tensor([1, 4, 2, 3]), torch.tensor([1, 3])
    drawn = torch.stack(
        distil(
            verifier, [ids] * count, [roots] * count, 2, (),
            draw=TokenDraw(temperature, seed=11), chunk=4000,
        )
    )  # fmt: skip
    for number, root in enumerate(roots.tolist()):
        first = (model(ids[None, : root + 1]).logits[0, -1] / temperature).softmax(-1)
        law = {}
        for a, b in itertools.product(range(5), repeat=2):
            prefix = torch.cat([ids[: root + 1], torch.tensor([a])])
            law[a, b] = first[a] * (model(prefix[None]).logits[0, -1] / temperature).softmax(-1)[b]
        counts = {pair: 0 for pair in law}
        for pair in drawn[:, number].tolist():
            counts[tuple(pair)] += 1
        likely = [pair for pair in law if law[pair] * count >= 5]
        assert len(likely) > 8
        chi = sum((counts[pair] - count * law[pair]) ** 2 / (count * law[pair]) for pair in likely)
        assert chi < 51.2  # the 0.1 % point at 24 degrees of freedom
    independent = (drawn[:, 0, 0] == drawn[:, 1, 0]).float().mean()
    assert independent < 0.99  # two roots do not share their noise


def test_the_noise_knows_text_and_position_only():
    verifier = Verifier(tiny_model("llama"))
    examples = [example.input_ids for example in texts(6)]
    roots = [torch.arange(1, len(ids)) for ids in examples]
    together = distil(verifier, examples, roots, 3, (), draw=TokenDraw(0.8, 5))
    alone = distil(verifier, examples[4:5], [roots[4][3:]], 3, (), draw=TokenDraw(0.8, 5), text_ids=[4])[0]
    assert torch.equal(alone, together[4][3:])
    assert not torch.equal(alone, distil(verifier, examples[4:5], [roots[4][3:]], 3, (), draw=TokenDraw(0.8, 6))[0])
