"""Query heads that share a key head: where our attention is taken, where not, and that it is the same attention."""

import weakref
from collections import Counter

import pytest
import torch
from models import ARCHITECTURES, GROUPED, MIXED, SMALL, attentions_of, generate, prompts, random_drafter, tiny_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from recurrent_drafter import DraftShape, RecurrentDraftingSpeculator
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import prefix_tree, root_tree
from recurrent_drafter.models import grouped_attention as ours
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.distillation import distilled_targets

ROWS, LAYERS, NODES, QUERY_HEADS = 3, 2, 3, 4
# Key heads of those whose query heads share them; all have 4 query heads.
KEY_HEADS = {
    **dict.fromkeys(("llama", "qwen2", "qwen2-mixed", "qwen3", "qwen3-mixed", "mistral", "mistral-window"), 2),
    **dict.fromkeys(("gemma", "gemma3-mixed", "phi3", "phi3-window", "cohere"), 2),
    "llama-one-key": 1,
}
CAPPED, ONE_EACH, BY_ITSELF = {"gemma2-mixed"}, {"gpt2", "phi", "opt", "opt-projected", "gpt_neox"}, {"falcon"}


def tree(rows=ROWS):
    """A root with two children, in each row."""
    tokens = torch.arange(1, 1 + rows * NODES).view(rows, NODES)
    children = tokens[:, None, 1:]
    return prefix_tree(tokens[:, 0], Beams(children, torch.zeros_like(children), -children.float()))


@pytest.fixture
def calls(monkeypatch):
    """(query heads, key heads, query rows) of every call of torch's attention from here on."""
    found, attend = [], functional.scaled_dot_product_attention

    def noting(query, key, *args, **kwargs):
        found.append((query.shape[1], key.shape[1], query.shape[2]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noting)
    return found


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@torch.inference_mode()
def test_query_heads_become_rows_where_they_share_a_key_head(name, calls):
    session, _ = Verifier(tiny_model(name, attentions_of(name)[0])).open(*prompts(ROWS), 32)
    calls.clear()
    session.forward_tree(tree())
    if name in KEY_HEADS:
        heads = KEY_HEADS[name]
        assert calls == [(heads, heads, NODES * QUERY_HEADS // heads)] * LAYERS
    elif name in CAPPED | ONE_EACH:
        assert calls == [(QUERY_HEADS, QUERY_HEADS, NODES)] * LAYERS
    else:
        assert name in BY_ITSELF or (name == "gpt_oss-mixed" and not calls)


@pytest.mark.parametrize("name", list(KEY_HEADS))
@torch.inference_mode()
def test_eager_attention_stays_eager(name, calls):
    session, _ = Verifier(tiny_model(name, "eager")).open(*prompts(ROWS), 32)
    session.forward_tree(tree())
    assert not calls


@torch.inference_mode()
def test_a_step_of_plain_decoding_after_many_columns_and_distilling_take_it_too(calls, monkeypatch):
    verifier = Verifier(tiny_model("llama"))
    session, _ = verifier.open(prompts(1)[0], None, 32)
    assert calls == [(4, 2, 12)] * LAYERS  # a causal pass: transformers' own, which repeats no keys without a mask
    calls.clear()
    session.forward_tree(root_tree(torch.ones(1, dtype=torch.int64)))
    assert calls == [(4, 2, 1)] * LAYERS  # after few columns folding takes longer than it saves
    calls.clear()
    monkeypatch.setattr(ours, "MANY", 13)
    session.forward_tree(root_tree(torch.ones(1, dtype=torch.int64)))
    assert calls == [(2, 2, 2)] * LAYERS
    calls.clear()
    text = prompts(1)[0][0]
    distilled_targets(verifier, text, torch.ones(len(text), dtype=torch.bool), 3, ())
    assert {(query, key) for query, key, rows in calls if rows > 1} == {(2, 2)}


class Repeats(TorchDispatchMode):
    """Counts masks (4 dimensions) that are repeated."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if str(function).startswith("aten.repeat.") and result.dim() == 4:
            self.shapes[tuple(result.shape)] += 1
        return result


@pytest.mark.parametrize(("name", "masks"), [("llama", 1), ("mistral-window", 1), ("gemma3-mixed", 2)])
@torch.inference_mode()
def test_a_mask_is_repeated_once_per_pass_not_per_layer(name, masks):
    session, _ = Verifier(tiny_model(name, num_hidden_layers=4, **four_layers(name))).open(*prompts(ROWS), 32)
    with Repeats() as repeats:
        session.forward_tree(tree())
    assert repeats.shapes == {(ROWS, 1, 2 * NODES, 12 + NODES): masks}


def four_layers(name):
    return {"layer_types": MIXED["layer_types"] * 2} if name.endswith("-mixed") else {}


@pytest.mark.parametrize("name", ["llama", "gemma3-mixed"])
@torch.inference_mode()
def test_the_model_has_its_own_attention_back(name, calls):
    """After passes, after an error within one, and while a stream is left in the middle; its outputs are unchanged."""
    model = tiny_model(name)
    ids, mask = prompts(ROWS)

    def own():
        calls.clear()
        logits = model(ids, attention_mask=mask).logits
        return logits, list(calls), model.config._attn_implementation

    logits, before, attention = own()
    assert attention == "sdpa"
    assert before == [(4, 4, 12)] * LAYERS

    def check():
        again = own()
        assert torch.equal(again[0], logits)
        assert again[1:] == (before, "sdpa")

    verifier = Verifier(model)
    session, _ = verifier.open(ids, mask, 32)
    check()
    session.forward_tree(tree())
    check()

    def failing(*_):
        assert model.config._attn_implementation == ours.NAME
        raise RuntimeError("in the middle of a pass")

    handle = model.get_output_embeddings().register_forward_pre_hook(failing)
    for attempt in (lambda: session.forward_tree(tree()), lambda: verifier.hiddens(ids, mask)):
        with pytest.raises(RuntimeError, match="in the middle of a pass"):
            attempt()
    handle.remove()
    check()
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(2, 2))
    speculator.attach_verifier(model)
    stream = speculator.stream(ids[:1], max_new_tokens=20, do_sample=False)
    next(stream)
    check()
    Verifier(model)  # is not refused
    del stream
    check()


def test_wrapped_text_models_take_it_and_their_other_parts_do_not(calls):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, **GROUPED, **MIXED, "head_dim": 16, "query_pre_attn_scalar": 16}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    ).eval()
    ids, mask = prompts(ROWS)
    names = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda *_: names.append([config._attn_implementation for config in (model.config, model.config.vision_config)])
    )
    with torch.inference_mode():
        session, _ = Verifier(model).open(ids, mask, 32)
        calls.clear()
        verified = session.forward_tree(tree())
        assert calls == [(2, 2, 2 * NODES)] * LAYERS
        assert names[-1] == ["sdpa", "sdpa"]
        for row in range(ROWS):
            linear = torch.cat([ids[row][mask[row].bool()], tree().tokens[row, [0, 2]]])
            torch.testing.assert_close(
                verified.logits[row, [0, 2]], model(linear[None]).logits[0, -2:], rtol=1e-4, atol=1e-4
            )


def test_models_that_ask_for_the_name_of_their_attention_keep_it():
    """DeepSeek 3.2 masks what its indexer left out under the names that it knows, and under no other."""
    with torch.device("meta"):
        sparse = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("deepseek_v32", **SMALL, **GROUPED, n_routed_experts=4)
        )
    assert not ours.finds_attention_by_name(sparse)
    assert not ours.finds_attention_by_name(tiny_model("falcon"))
    assert ours.finds_attention_by_name(tiny_model("llama"))


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 3, True


LAYER = Layer()


def defined(query, key, value, mask, scale=None):
    """Attention as its definition has it, (B, heads, N, d) -> (B, N, heads, d)."""
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1).double() for part in (key, value))
    scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1) @ value).transpose(1, 2)


def states(rows=5, columns=9, dtype=torch.float32, key_heads=2):
    """Queries, keys and values as they come: transposed, and parts of a larger store."""
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(2, rows, 6, 16, generator=generator).transpose(1, 2)
    store = torch.randn(2, 2, key_heads, columns + 7, 16, generator=generator)
    return [query.to(dtype), *store[:, :, :, :columns].to(dtype)]


def bias(rows=5, columns=9, dtype=torch.float32, heads=1):
    seen = torch.rand(2, heads, rows, columns, generator=torch.Generator().manual_seed(2)) < 0.6
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(
        ~seen | (torch.arange(columns) == 3), torch.finfo(dtype).min
    )


@pytest.mark.parametrize(
    ("rows", "mask"),
    [
        (5, bias()),
        (5, bias()[:1]),
        (5, bias() == 0),
        (5, bias(rows=1)),
        (1, bias(rows=1)),
        (1, None),
        (70, bias(rows=70)),
    ],
)
def test_it_is_the_attention_of_the_definition(rows, mask, monkeypatch):
    monkeypatch.setattr(ours, "MANY", 1)
    query, key, value = states(rows)
    found, weights = ours.grouped_attention(LAYER, query, key, value, mask, scaling=0.3, dropout=0.0, use_cache=True)
    torch.testing.assert_close(found.double(), defined(query, key, value, mask, 0.3), rtol=1e-5, atol=1e-6)
    assert found.is_contiguous()
    assert weights is None


def test_in_bfloat16_it_is_as_near_to_the_definition_as_the_models_own():
    query, key, value = states(dtype=torch.bfloat16)
    mask = bias(dtype=torch.bfloat16)
    exact = defined(query, key, value, mask)
    found, _ = ours.grouped_attention(LAYER, query, key, value, mask)
    own, _ = ours.sdpa_attention_forward(LAYER, query, key, value, mask)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 1.5 * (own - exact).abs().max()


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ({}, {"softcap": 30.0}),
        ({}, {"s_aux": torch.zeros(6)}),
        ({}, {"position_bias": torch.zeros(2, 6, 5, 9)}),
        ({}, {"dropout": 0.1}),
        ({}, {"a_new_keyword": 1}),
        ({"mask": bias(heads=6)}, {}),
        ({"mask": None}, {}),
        ({"key_heads": 6}, {}),
    ],
)
def test_what_it_does_not_know_keeps_the_models_own_path(inputs, options, monkeypatch):
    given = []
    monkeypatch.setattr(ours, "sdpa_attention_forward", lambda *args, **kwargs: given.append((args, kwargs)))
    query, key, value = states(key_heads=inputs.get("key_heads", 2))
    mask = inputs.get("mask", bias())
    ours.grouped_attention(LAYER, query, key, value, mask, **options)
    (((layer, *tensors), keywords),) = given
    assert layer is LAYER
    assert all(found is wanted for found, wanted in zip(tensors, (query, key, value, mask), strict=True))
    assert keywords == options
    given.clear()
    ours.grouped_attention(LAYER, *states(), bias(), softcap=None, dropout=0.0)
    assert not given


def test_a_repeated_mask_lives_no_longer_than_its_mask(monkeypatch):
    repeated, attend = [], functional.scaled_dot_product_attention

    def noting(*args, attn_mask, **kwargs):
        repeated.append(weakref.ref(attn_mask))
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noting)
    mask = bias()
    for _ in range(2):
        ours.grouped_attention(LAYER, *states(), mask)
    assert repeated[0]() is repeated[1]() is not None
    del mask
    assert repeated[0]() is None


def test_one_mask_for_layers_of_different_groups():
    mask = bias()
    for heads in (2, 3, 2):
        query, key, value = states(key_heads=heads)
        found, _ = ours.grouped_attention(LAYER, query, key, value, mask)
        torch.testing.assert_close(found.double(), defined(query, key, value, mask), rtol=1e-5, atol=1e-6)


def test_greedy_replies_in_a_ragged_batch_are_the_models_own():
    """Seven query heads a key head, as Qwen2 has them."""
    model = tiny_model("qwen2", hidden_size=112, num_attention_heads=14)
    ids, mask = prompts(5)
    expected = generate(model, ids, mask)
    speculator = RecurrentDraftingSpeculator(lookup=False)
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)
