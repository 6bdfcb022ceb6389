"""What prompt and replies have said before: what is found, how sure it is, and that it changes no token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, generate, prompts, tiny_model
from transformers import PreTrainedTokenizerFast

from recurrent_drafter import DraftShape, RecurrentDraftingSpeculator
from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.core.metrics import tokens_by_source
from recurrent_drafter.core.tree import DRAFTER, LOOKUP, VERIFIER, DraftTree, joined, pruned
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding import lookup as lookup_module
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.lookup import END, LEAST, LONGEST_CHAIN, Chains, Lookup, Memory, Occurrences
from recurrent_drafter.decoding.rates import EARLIER, PROMPT, REPLY, AcceptanceByMatch
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.models.loading import load_drafter, load_verifier
from recurrent_drafter.models.verifier import Verifier

EIGHT = DraftShape(1, 7, 8)  # nodes at every step, whatever the clock says
NAMES = ["gpt2", "llama", "qwen2-mixed", "gemma"]


def after(text, last):
    """The places that follow the newest occurrences of a text's last so many tokens, by `Occurrences`."""
    seen = Occurrences(text)
    return list(seen.after(seen.runs[last - 1], last))


def test_occurrences_by_hand():
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    assert after(text, 2) == [5, 2] and after(text, 1) == [5, 2] and after(text, 3) == []
    assert after([*text, 3], 3) == [3] and after([*text, 3, 1], 4) == [4]
    assert after([7, 7, 7, 7, 7], 1) == [4, 3, 2], "the three newest"
    seen = Occurrences(text)
    assert [seen.matched(place, text) for place in (5, 2, 4)] == [2, 2, 0]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_a_text_read_at_once_or_grown_is_the_same(text, cut):
    grown = Occurrences(text[:cut])
    for token in text[cut:]:
        grown.add(token)
    for length in range(1, lookup_module.LOOKED_UP + 1):
        tail = text[-length:]
        places = (
            [n for n in range(length, len(text)) if text[n - length : n] == tail][::-1] if len(tail) == length else []
        )
        for seen in (grown, Occurrences(text)):
            if len(text) >= length:
                assert list(seen.after(seen.runs[length - 1], length)) == places[: lookup_module.TRIED]


def looking(prompt, reply, limit=100, memory=None, rates=None):
    """A lookup at work in a reply."""
    state = GenerationState(torch.tensor([prompt]), limit)
    found = Lookup(state, rates or AcceptanceByMatch(), memory or Memory())
    state.generated[0] = list(reply)
    return found


def chains(lookup, longest=8):
    """Every node's path, and its probability."""
    found = lookup.find(longest)
    if found is None:
        return {}
    (row,) = found.rows
    paths = [()]
    for token, parent, depth in zip(row.tokens, row.parents, row.depths, strict=True):
        paths.append((*paths[parent], token))
        assert len(paths[-1]) == depth
    return dict(zip(paths[1:], row.probabilities, strict=True))


def along(rates, source, matched, tokens, rank=0):
    """The probabilities of a chain, each token after a match that is one longer."""
    found, probability = {}, 1.0
    for depth in range(1, len(tokens) + 1):
        probability *= rates(source, rank if depth == 1 else 0, matched + depth - 1)
        if probability < LEAST:
            break
        found[tuple(tokens[:depth])] = pytest.approx(probability)
    return found


def test_a_chain_from_the_prompt():
    rates = AcceptanceByMatch()
    found = chains(looking([1, 2, 3, 4, 5, 9, 1, 2], [3], rates=rates))
    expected = along(rates, PROMPT, 3, [4, 5, 9, 1, 2, 3, 4, 5])
    assert found == expected and (4, 5) in found


def test_chains_that_begin_with_different_tokens():
    rates = AcceptanceByMatch()
    found = chains(looking([7, 1, 8, 1, 6, 5], [1], rates=rates))
    assert found == along(rates, PROMPT, 1, [6, 5, 1, 6, 5]) | along(rates, PROMPT, 1, [8, 1, 6, 5], rank=1)
    assert (6,) in found and (8,) in found


def test_a_longer_match_goes_first_and_the_reply_counts_as_itself():
    rates = AcceptanceByMatch()
    found = chains(looking([9], [1, 2, 5, 6, 2, 7, 8, 1, 2], rates=rates), longest=1)
    assert found == along(rates, REPLY, 2, [5]) | along(rates, REPLY, 1, [7], rank=1)


def test_what_repeats_at_the_end_goes_on():
    rates = AcceptanceByMatch()
    found = chains(looking([5], [3, 4, 3, 4, 3, 4], rates=rates), longest=5)
    assert found == along(rates, REPLY, 4, [3, 4, 3, 4, 3]) and len(found) > 2


def test_earlier_replies_end_where_they_ended():
    rates, memory = AcceptanceByMatch(), Memory()
    first = looking([9], [1, 2, 3], memory=memory, rates=rates)
    first.close()
    assert memory.replies.tokens == [1, 2, 3, END]
    assert chains(looking([8], [2], memory=memory, rates=rates)) == along(rates, EARLIER, 1, [3])
    assert chains(looking([8], [3], memory=memory, rates=rates)) == {}
    assert chains(looking([2, 5], [2], memory=memory, rates=rates), 1).keys() == {(5,), (3,)}, "its own text too"


def test_a_memory_of_nothing_remembers_nothing():
    memory = Memory(0)
    looking([9], [1, 2, 3], memory=memory).close()
    assert chains(looking([8], [2], memory=memory)) == {}


def test_a_memory_keeps_the_newest():
    memory = Memory(20)
    for number in range(30):
        memory.add([number, number, number])
        assert memory.replies.tokens[-4:] == [number, number, number, END] and len(memory.replies.tokens) <= 20


def test_no_chain_passes_the_end():
    text = list(range(1, 40))
    assert chains(looking(text, [1]), longest=0) == {}
    sure = AcceptanceByMatch()
    for matched in range(17):
        for _ in range(500):
            sure.verified(PROMPT, 0, matched, accepted=True)
    for longest in (1, 3, 30):
        assert max(map(len, chains(looking(text, [1], rates=sure), longest))) == min(longest, LONGEST_CHAIN)


def test_every_token_of_a_reply_tells_how_sure_a_match_is():
    rates = AcceptanceByMatch()
    before = {matched: rates(REPLY, 0, matched) for matched in (1, 2)}
    looking([9], [1, 2, 1, 2, 1, 3], rates=rates).find(8)
    # After 1 2 1 comes 2, which 1 alone had said; after 1 2 1 2 comes 1, as 1 2 had said; then 3 and not 2.
    assert rates(REPLY, 0, 1) == pytest.approx((4 * before[1] + 1) / 5)
    assert rates(REPLY, 0, 2) == pytest.approx((4 * before[2] + 1) / 5)
    assert rates(REPLY, 0, 3) < AcceptanceByMatch()(REPLY, 0, 3)


def tree_of(paths):  # path -> probability; of one row
    """A tree whose nodes come in this order, each after its parent."""
    numbers = {(): 0} | {path: number for number, path in enumerate(paths, 1)}
    rows = [(0, 0, 0, 1.0), *((path[-1], numbers[path[:-1]], len(path), p) for path, p in paths.items())]
    tokens, parents, depths, probabilities = (torch.tensor([column]) for column in zip(*rows, strict=True))
    return DraftTree(tokens, parents, depths, probabilities.log(), (depths > 0) * LOOKUP, int(depths.max()))


def paths_of(tree):
    """The way back; nodes of probability 0 are none."""
    paths, found = [], {}
    for number, (token, parent) in enumerate(zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True)):
        paths.append((*paths[parent], token) if number else ())
        probability = float(tree.log_probs[0, number].exp())
        if number and probability:
            assert paths[-1] not in found, "a prefix is one node"
            found[paths[-1]] = pytest.approx(probability)
    return found


@st.composite
def falling_paths(draw):
    """Distinct prefixes with probabilities that fall along them, and differ."""
    paths = {}
    for _ in range(draw(st.integers(0, 4))):
        path, probability = (), 1.0
        for token in draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)):
            path = (*path, token)
            probability = paths.setdefault(path, probability * draw(st.floats(0.3, 0.95)))
    return paths


@settings(max_examples=200, deadline=None)
@given(falling_paths(), falling_paths(), st.integers(1, 12))
def test_joined_trees_hold_every_prefix_once(own, other, count):
    union = {path: max(own.get(path, 0.0), other.get(path, 0.0)) for path in own | other}
    both = joined(tree_of(own), tree_of(other))
    assert paths_of(both) == union
    best = sorted(union, key=lambda path: -union[path])
    if len({round(p, 5) for p in union.values()}) == len(union):  # no ties
        assert paths_of(pruned(both, count)).keys() == set(best[: count - 1])


@pytest.mark.parametrize("name", NAMES)
def test_lookup_alone_changes_no_token(name):
    """Through transformers' own `generate`: greedy, batched, and with a seed."""
    model = tiny_model(name)
    ids, mask = prompts(4)
    ids[:, 6:9] = ids[:, 9:12]  # a prompt that repeats itself
    plain = RecurrentDraftingSpeculator(lookup=False)
    drawing = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.3, "top_k": 5, "seed": 3}
    for lookup in (RecurrentDraftingSpeculator(), RecurrentDraftingSpeculator(shape=EIGHT, lookup=True)):
        assert torch.equal(generate(model, ids, mask, custom_generate=lookup), generate(model, ids, mask))
        drawn = [model.generate(ids, attention_mask=mask, custom_generate=one, **drawing) for one in (plain, lookup)]
        assert torch.equal(*drawn)


@pytest.fixture(scope="module")
def demo():
    return load_verifier("demo", dtype="float32")


def encoded(tokenizer, text):
    return tokenizer(text, return_tensors="pt")["input_ids"]


def test_repetition_is_found_and_counted(demo):
    """A model that repeats what it was told: fewer steps, the same reply, and whose tokens it is made of."""
    model, tokenizer = demo
    prompt = encoded(tokenizer, "table for two at seven, table for two at eight, table for two at nine, table")
    expected = model.generate(prompt, do_sample=False, max_new_tokens=60, eos_token_id=[-1], pad_token_id=0)
    speculator = RecurrentDraftingSpeculator(shape=EIGHT, lookup=True)
    found = model.generate(
        prompt, do_sample=False, max_new_tokens=60, eos_token_id=[-1], pad_token_id=0, custom_generate=speculator
    )
    assert torch.equal(found, expected)
    stats = speculator.stats
    assert stats.tokens_per_step > 1 and len(stats.sources[0]) == 60
    counts = tokens_by_source(stats.sources)
    assert counts["drafter"] == 0 and counts["lookup"] == sum(accepted for _, accepted in stats.drafts[0])
    assert stats.sources[0][0] == VERIFIER


def test_stop_strings(demo):
    model, tokenizer = demo
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    prompt = encoded(tokenizer, "one two three one two three one two")
    plain = model.generate(prompt, do_sample=False, max_new_tokens=40, eos_token_id=[-1], pad_token_id=0)
    stop = tokenizer.decode(plain[0, prompt.shape[1] + 12 : prompt.shape[1] + 13]).strip()[-1:] or "."
    options = {"do_sample": False, "max_new_tokens": 40, "stop_strings": [stop], "tokenizer": tokenizer}
    options |= {"eos_token_id": [-1], "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    speculator = RecurrentDraftingSpeculator()
    speculator.attach_verifier(model)
    assert torch.equal(speculator.generate(prompt, **options), expected)
    assert expected.shape[1] < plain.shape[1]


def test_a_wrong_chain_changes_no_token(monkeypatch):
    """Whatever lookup says, in whatever order and however sure it is."""
    generator = torch.Generator().manual_seed(0)

    def wrong(lookup, row, longest):
        found, count = Chains(), int(torch.randint(0, 5, (), generator=generator))
        for depth in range(1, min(count, longest) + 1):
            token = int(torch.randint(0, VOCABULARY, (), generator=generator))
            found.add(token, parent=depth - 1, depth=depth, probability=0.9**depth)
        return found

    monkeypatch.setattr(Lookup, "_chains", wrong)
    model = tiny_model("llama")
    ids, mask = prompts(3)
    speculator = RecurrentDraftingSpeculator(shape=EIGHT, lookup=True)
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), generate(model, ids, mask))
    assert any(drafted for row in speculator.stats.drafts for drafted, _ in row), "something wrong must be verified"


def test_the_walk_with_lookup_is_decodings_own_figure(demo):
    """With the bundled drafter at fixed shapes, and lookup alone with so many nodes."""
    model, tokenizer = demo
    dialogues = load_dialogues("demo", None, "eval").dialogues
    asked = prompts_from_dialogues(dialogues, tokenizer, count=6, max_length=200)
    verifier, drafter = Verifier(model), load_drafter(demo_drafter_path(), dtype=torch.float32)
    replies = greedy_replies(verifier, asked, 48, ())
    held_out, gained = HeldOutReplies(verifier, replies), 0.0
    for one, shape in (
        *((drafter, shape) for shape in (DraftShape(1, 3), DraftShape(3, 4, 9))),
        *((None, DraftShape(1, nodes - 1, nodes)) for nodes in (2, 16)),
    ):
        speculator = RecurrentDraftingSpeculator(one, shape, lookup=True, remembered=0)
        speculator.attach_verifier(model)
        steps = tokens = 0
        sources = set()
        for reply in replies:
            options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": [-1], "pad_token_id": 0}
            output = speculator.generate(reply.prompt[None], **options)
            assert torch.equal(output[0, len(reply.prompt) :], reply.tokens)
            steps, tokens = steps + speculator.stats.steps, tokens + speculator.stats.tokens
            sources |= {source for row in speculator.stats.sources for source in row}
        assert LOOKUP in sources and (DRAFTER in sources) == (one is not None)
        if one is None:
            walked = held_out.tokens_per_step_of_lookup(shape.nodes)
        else:
            measured = held_out.measure(drafter, shape, top_k=0)
            walked = measured["tokens_per_step_with_lookup"]
            gained += walked - measured["tokens_per_step"]
        assert walked == pytest.approx(tokens / steps, abs=1e-12), shape
    assert gained > 0
