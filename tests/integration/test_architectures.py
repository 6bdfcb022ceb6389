"""Trees verified by stock models of many architectures: what comes out is what the model says by itself.

Linear text comes from the model's own forward pass and `generate`, with transformers' masks and caches.
"""

from functools import cache

import pytest
import torch
from models import (
    ARCHITECTURES,
    LONGEST_PROMPT,
    VOCABULARY,
    attentions_of,
    generate,
    prompts,
    random_drafter,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from recurrent_drafter import DraftShape, RecurrentDraftingSpeculator
from recurrent_drafter.core.accept import follow_tree
from recurrent_drafter.core.tree import DraftTree, root_tree
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.distillation import distilled_targets

every_architecture = pytest.mark.parametrize("name", list(ARCHITECTURES))
every_model = pytest.mark.parametrize(
    ("name", "attention"), [(name, attention) for name in ARCHITECTURES for attention in attentions_of(name)]
)

# A chain of four, and a second branch:      0 - 1 - 2 - 3 - 4
#                                             `- 5 - 6
PARENTS, DEPTHS, NODES = [0, 0, 1, 2, 3, 0, 5], [0, 1, 2, 3, 4, 1, 2], 7
CHAIN, BRANCH = [0, 1, 2, 3, 4], [0, 5, 6, 6, 6]


def tree_of(tokens: torch.Tensor) -> DraftTree:  # (B, 7)
    parents, depths = (torch.tensor(column).expand(len(tokens), -1) for column in (PARENTS, DEPTHS))
    return DraftTree(tokens, parents, depths, torch.zeros(tokens.shape), torch.ones_like(tokens), max_depth=4)


def unpadded(ids, mask):
    return [row[own.bool()] for row, own in zip(ids, mask, strict=True)]


@every_model
@torch.inference_mode()
def test_tree_logits_are_linear_logits(name, attention):
    """Four verifications in a row; after each, every row keeps another number of nodes, and two rows leave halfway."""
    model = tiny_model(name, attention)
    verifier = Verifier(model)
    ids, mask = prompts(5)
    texts = unpadded(ids, mask)
    session, read = verifier.open(ids, mask, 16)  # the cache has to grow
    generator = torch.Generator().manual_seed(3)
    turns = [([0, 4, 2, 1, 2], [CHAIN, CHAIN, BRANCH, CHAIN, BRANCH]), ([3, 0, 1, 0, 4], [CHAIN] * 5)]
    turns += [([1, 0, 2], [CHAIN, CHAIN, BRANCH]), ([0, 0, 0], [CHAIN] * 3)]
    for row, text in enumerate(texts):
        torch.testing.assert_close(read.logits[row, -1], model(text[None]).logits[0, -1], rtol=1e-4, atol=1e-3)
    for turn, (n_accepted, paths) in enumerate(turns):
        if turn == 2:
            session.select([0, 2, 3])
            texts = [texts[row] for row in (0, 2, 3)]
        tree = tree_of(torch.randint(1, VOCABULARY, (len(texts), NODES), generator=generator))
        verified = session.forward_tree(tree)
        for row, text in enumerate(texts):
            for branch in (CHAIN, BRANCH[:3]):
                linear = model(torch.cat([text, tree.tokens[row, branch]])[None]).logits[0, -len(branch) :]
                torch.testing.assert_close(verified.logits[row, branch], linear, rtol=1e-4, atol=1e-3)
        session.keep(torch.tensor(paths), n_accepted)
        kept = [path[: n + 1] for path, n in zip(paths, n_accepted, strict=True)]
        texts = [torch.cat([texts[row], tree.tokens[row, path]]) for row, path in enumerate(kept)]
        pads = [0, 2, 4, 6, 8] if turn < 2 else [0, 4, 6]
        assert session.lengths == [len(text) + skipped for text, skipped in zip(texts, pads, strict=True)]


@every_model
def test_greedy_output_is_the_models_own(name, attention):
    model, ids, mask, expected = ragged_replies(name, attention)
    assert len(expected[:, LONGEST_PROMPT:].unique()) >= 20, "outputs must vary"
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(3, 4))
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)
    ids, mask = prompts(1)
    expected = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)


@cache
def ragged_replies(name, attention):
    """A model, five prompts with their mask, and what the model makes of them; nobody changes them."""
    model = tiny_model(name, attention)
    ids, mask = prompts(5)
    return model, ids, mask, generate(model, ids, mask)


@every_model
def test_rows_that_advance_differently_and_leave_midway_say_the_same(name, attention):
    model, ids, mask, expected = ragged_replies(name, attention)
    expected = expected[:, LONGEST_PROMPT:]
    found = decode_with_hints(Verifier(model), ids, mask, expected, leave=(0, 3))
    for row, reply in enumerate(found):
        assert reply == expected[row, : len(reply)].tolist()
        assert len(reply) < 40 if row in (0, 3) else len(reply) == 40


@torch.inference_mode()
def decode_with_hints(verifier, ids, mask, texts, leave=()):
    """Greedy replies as long as the texts (B, R), from trees whose chain follows the texts a few tokens, then errs.

    The rows in ``leave`` go when the first of the others is halfway; a row that is complete goes as well.
    """
    generator = torch.Generator().manual_seed(7)
    batch, length = texts.shape
    session, read = verifier.open(ids, mask, 16)
    root = read.logits[:, -1].argmax(-1)
    replies, rows = [[int(token)] for token in root], list(range(batch))
    while rows:
        right = torch.randint(0, 5, (len(rows), 1), generator=generator)
        at = torch.tensor([[len(replies[row])] for row in rows])
        hints = texts[rows].gather(1, (at + torch.arange(4)).clamp(max=length - 1))
        hints = torch.where(torch.arange(4) < right, hints, (hints + 1) % VOCABULARY)
        tree = tree_of(torch.cat([root[:, None], hints, (hints[:, :2] + 50) % VOCABULARY], dim=1))
        best = session.forward_tree(tree).logits.argmax(-1)
        accepted = follow_tree(tree, lambda nodes, best=best: best.gather(1, nodes[:, None])[:, 0])
        n_accepted = accepted.n_accepted.tolist()
        session.keep(accepted.path, n_accepted)
        for row, tokens, n in zip(rows, accepted.tokens.tolist(), n_accepted, strict=True):
            replies[row] = [*replies[row], *tokens[: n + 1]][:length]
        halfway = max(map(len, replies)) > length // 2
        stay = [i for i, row in enumerate(rows) if len(replies[row]) < length and not (halfway and row in leave)]
        root, rows = accepted.bonus_token[stay], [rows[i] for i in stay]
        if rows:
            session.select(stay)
    return replies


@pytest.mark.slow
@every_architecture
def test_fifty_prompts(name):
    """Zero differences in float32, alone and in ragged batches; a numeric tie is counted, anything else fails."""
    model = tiny_model(name, attentions_of(name)[0])
    verifier, drafter = Verifier(model), random_drafter()
    ties = 0
    for seed in range(10):
        ids, mask = prompts(5, seed)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.where(mask.bool(), torch.randint(1, VOCABULARY, ids.shape, generator=generator), 0)
        expected = generate(model, ids, mask)[:, LONGEST_PROMPT:]
        speculator = RecurrentDraftingSpeculator(drafter, DraftShape(3, 4))
        batched = generate(model, ids, mask, custom_generate=speculator)[:, LONGEST_PROMPT:]
        hinted = decode_with_hints(verifier, ids, mask, expected)
        for row, prompt in enumerate(unpadded(ids, mask)):
            ones = torch.ones_like(prompt)[None]
            own = generate(model, prompt[None], ones)[0, len(prompt) :].tolist()
            alone = generate(model, prompt[None], ones, custom_generate=speculator)[0, len(prompt) :].tolist()
            batch_own = expected[row].tolist()
            for wanted, found in ((own, alone), (batch_own, batched[row].tolist()), (batch_own, hinted[row])):
                divergence = first_divergence(verifier, prompt, wanted, found)
                assert divergence is None or divergence.is_tie, divergence
                ties += divergence is not None
    print(f"{name}: 50 prompts, {ties} ties")  # noqa: T201


@pytest.mark.parametrize("name", ["mistral-window", "gemma2-mixed", "gemma3-mixed"])
def test_distilled_targets_see_the_window_too(name):
    model = tiny_model(name)
    text = prompts(1, seed=3)[0][0].repeat(2)
    targets = distilled_targets(Verifier(model), text, torch.ones(24, dtype=torch.bool), 4, (), chunk=7)
    for position in range(24):
        prefix = text[None, : position + 1]
        assert targets[position].tolist() == generate(model, prefix, torch.ones_like(prefix), new=4)[0, -4:].tolist()


@torch.inference_mode()
def test_a_window_without_distances_is_refused():
    verifier = Verifier(tiny_model("mistral-window"))
    session, _ = verifier.open(*prompts(1), 16)
    with pytest.raises(ValueError, match="mistral attends to a window of 8 tokens"):
        verifier.forward(
            torch.ones(1, 1, dtype=torch.int64), torch.tensor([[12]]), torch.zeros(1, 1, 13), session.cache
        )


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@torch.inference_mode()
def test_hidden_states_do_not_depend_on_padding(name):
    verifier = Verifier(tiny_model(name))
    ids, mask = prompts(3)
    for padded_ids, padding in ((ids, mask), (ids.flip(1), mask.flip(1))):
        hiddens = verifier.hiddens(padded_ids, padding)
        for row, text in enumerate(unpadded(padded_ids, padding)):
            alone = verifier.hiddens(text[None])[0]
            torch.testing.assert_close(hiddens[row][padding[row].bool()], alone, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_tree_may_reach_beyond_the_last_position():
    """Rows near the end of the context may be verified together with rows that still have room."""
    model = tiny_model("gpt2", n_positions=14)
    ids, mask = prompts(2)
    session, _ = Verifier(model).open(ids, mask, 16)
    tree = tree_of(torch.arange(1, 1 + 2 * NODES).view(2, NODES))
    verified = session.forward_tree(tree)
    for row, (text, room) in enumerate(zip(unpadded(ids, mask), (2, 4), strict=True)):
        linear = model(torch.cat([text, tree.tokens[row, :room]])[None]).logits[0, -room:]
        torch.testing.assert_close(verified.logits[row, :room], linear, rtol=1e-4, atol=1e-3)


def test_longrope_is_exact_within_the_original_context():
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors, "factor": 4.0}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert Verifier(model).context_length == 64
    assert Verifier(tiny_model("phi3")).context_length == 256


class NoSynchronization(TorchDispatchMode):
    """Fails on operations whose result the host would have to wait for on an accelerator."""

    waiting = (
        "aten.item",
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.masked_select",
        "aten.equal",
        "aten.is_nonzero",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(self.waiting), function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "gemma2-mixed"])
@torch.inference_mode()
def test_a_step_does_not_wait_for_the_device(name):
    session, _ = Verifier(tiny_model(name)).open(*prompts(5), 64)
    path = torch.tensor([CHAIN] * 5)
    with NoSynchronization():
        for n_accepted in ([1, 0, 4, 2, 3], [0, 0, 0, 0, 0], [4, 1, 1, 0, 0]):
            session.forward_tree(tree_of(torch.ones(5, NODES, dtype=torch.int64)))
            session.keep(path, n_accepted)
        session.select([1, 3])
        session.forward_tree(root_tree(torch.ones(2, dtype=torch.int64)))
        session.keep(path[:2], [0, 0])


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi"),
    "falcon": ({**TINY, "alibi": True}, "ALiBi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, "recurrent state"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2}, "recurrent state"),
    "jamba": ({**TINY, "intermediate_size": 32, "num_experts": 2, "use_mamba_kernels": False}, "recurrent state"),
    "minimax": (
        {**TINY, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 2, "num_key_value_heads": 2},
        "linear_attention",
    ),
    "llama4_text": (
        {**TINY, "intermediate_size": 32, "intermediate_size_mlp": 32, "head_dim": 8, "num_local_experts": 2},
        "chunked_attention",
    ),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "local",
    ),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "no key-value cache"),
    "bert": ({**TINY, "intermediate_size": 32, "is_decoder": False}, "load it with is_decoder=True"),
    "roberta": ({**TINY, "intermediate_size": 32, "is_decoder": False}, "load it with is_decoder=True"),
    "t5": ({"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32}, "encoder-decoder"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_verified_exactly_is_refused_by_name(name):
    options, reason = REFUSED[name]
    model = tiny_model(name, "eager", **options)
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} cannot be a verifier: .*{reason}") as error:
        Verifier(model)
    assert "\n" not in str(error.value)


def test_attentions_without_a_mask_and_split_widths_are_refused():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask for a tree"):
        Verifier(model)
    model = tiny_model("llama")
    model.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 24))
    with pytest.raises(ValueError, match="its head reads a width of 64, its embedding has 24"):
        Verifier(model)
