"""Conversations that go on from their cache: the replies of a fresh start, and only what is new is read."""

import pytest
import torch
from models import ARCHITECTURES, VOCABULARY, attentions_of, random_drafter, tiny_model
from transformers import StoppingCriteria

from recurrent_drafter import DraftShape, RecurrentDraftingSpeculator
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.models import verifier as reading

every_model = pytest.mark.parametrize(
    ("name", "attention"), [(name, attention) for name in ARCHITECTURES for attention in attentions_of(name)]
)
NEW = 14  # tokens of a reply
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": 11}


class Passes:
    """Notes how many tokens each pass of a model reads, and whether it is given a mask."""

    def __init__(self, model):
        self.lengths, self.masked = [], []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, given):
        self.lengths.append(given["input_ids"].shape[1])
        self.masked.append(given["attention_mask"] is not None)


class Oracle:
    """Drafts what it was told will be said, whatever it is asked after."""

    def __init__(self, *_):
        self.said, self.state = [], None

    def follow(self, state):
        self.state = state

    def __call__(self, hidden, root, width, length, deeper=None):
        at = len(self.state.generated[0])
        right = [*self.said[at : at + length], *[0] * length][:length]
        tokens = (torch.tensor(right)[:, None] + torch.arange(width)) % VOCABULARY
        scores = -torch.arange(1.0, 1 + length * width).view(1, length, width)
        return Beams(tokens[None], torch.zeros_like(tokens[None]), scores)


def text(length, seed):
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reply(speculator, prompt, session=None, **options):
    ids, options = torch.tensor([prompt]), {"max_new_tokens": NEW, "do_sample": False, **options}
    stream = speculator.stream(ids, torch.ones_like(ids), session=session, **options)
    return [token for step in stream for token in step]


def attached(model, drafter=True, shape=DraftShape(3, 4), **options):  # noqa: B008  it is frozen
    given = (random_drafter(), shape) if drafter else (None,)
    speculator = RecurrentDraftingSpeculator(*given, **{"lookup": False, **options})
    speculator.attach_verifier(model)
    return speculator


@every_model
def test_every_turn_is_a_fresh_start_and_reads_what_is_new(name, attention, monkeypatch):
    """With a drafter, without, by lookup; what is new is read a few tokens at a time, beyond any window."""
    monkeypatch.setattr(reading, "READ_AT_ONCE", 4)
    model = tiny_model(name, attention)
    drafted = attached(model)
    session, passes, asked, said = drafted.session(), Passes(model), [], set()
    ways = [drafted, drafted.without_drafter(), attached(model, drafter=False, lookup=True), drafted]
    for turn, speculator in enumerate(ways):
        kept = session.tokens
        asked += text(9, turn)
        del passes.lengths[:]
        answer = reply(speculator, asked, session)
        assert session.reused == len(kept) and len(asked) - len(kept) in ((9, 10) if turn else (9,))
        wanted = [4, 4, len(asked) - len(kept) - 8] if turn else [9]
        assert passes.lengths[: len(wanted)] == wanted
        assert answer == reply(speculator, asked)
        asked += answer
        said |= set(answer)
    assert len(said) >= 12, "outputs must vary"


def test_a_fresh_prompt_needs_no_mask():
    model = tiny_model("llama")
    speculator, passes = attached(model, drafter=False), Passes(model)
    session = speculator.session()
    answer = reply(speculator, text(9, 1), session)
    assert not any(passes.masked)
    reply(speculator, [*text(9, 1), *answer, 5], session)
    assert passes.lengths == [9, *[1] * (NEW - 1), 2, *[1] * (NEW - 1)]
    assert [n for n, masked in enumerate(passes.masked) if masked] == [NEW]


@pytest.mark.parametrize("drafter", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma3-mixed"])
def test_sampling_with_a_seed_and_other_settings_in_between(name, drafter):
    speculator = attached(tiny_model(name), drafter)
    session, asked = speculator.session(), text(12, 0)
    settings = [SAMPLED, {**SAMPLED, "seed": 3, "temperature": 1.3}, {}, {**SAMPLED, "repetition_penalty": 1.3}]
    for turn, options in enumerate(settings):
        answer = reply(speculator, asked, session, **options)
        assert answer == reply(speculator, asked, **options)
        assert answer == reply(speculator.without_drafter(), asked, **options)
        assert (session.reused > 0) == (turn > 0)
        asked = [*asked, *answer, *text(5, turn)]


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_edited_turns_rewritten_history_and_another_conversation(name):
    speculator = attached(tiny_model(name))
    session, first = speculator.session(), text(10, 0)
    answer = reply(speculator, first, session)
    whole = [*first, *answer, *text(6, 1)]
    prompts = {
        "goes on": (whole, 10 + NEW - 1),
        "the same again": (whole, len(whole) - 1),
        "only the beginning": (whole[:15], 14),
        "an edited turn": ([*whole[:12], 1 + whole[12] % 96, *whole[13:]], 12),
        "a thought is gone": (whole[:11] + whole[14:], 11),
        "from the beginning": (first, 9),
        "something else": ([1 + first[0] % 96, *text(20, 5)], 0),
        "and back": (whole, 0),
    }
    for what, (prompt, reused) in prompts.items():
        assert reply(speculator, prompt, session) == reply(speculator, prompt), what
        assert session.reused == reused, what


def test_two_conversations_do_not_disturb_each_other():
    speculator = attached(tiny_model("qwen2"))
    talks = [(speculator.session(), text(8, seed)) for seed in (1, 2)]
    for turn in range(3):
        for session, asked in talks:
            answer = reply(speculator, asked, session)
            assert answer == reply(speculator, asked) and (session.reused > 0) == (turn > 0)
            asked += [*answer, *text(4, turn)]


def test_whole_paths_and_an_end_token_inside_of_one():
    """What was accepted beyond the end of a reply is in the cache, and is no part of the conversation."""
    model = tiny_model("gpt2")
    speculator = attached(model, drafting=Oracle)
    oracle, session, asked = speculator._draft, speculator.session(), text(9, 4)
    free = reply(speculator, asked)
    oracle.said = free
    place = next(at for at, token in enumerate(free) if at > 5 and at % 5 and token not in free[:at])
    passes = Passes(model)
    answer = reply(speculator, asked, session, end_ids=[free[place]])
    assert answer == free[: place + 1] and len(passes.lengths) == 1 + -(-place // 5)
    assert session.tokens == [*asked, *answer]  # the end token too was verified
    asked += [*answer, *text(3, 5)]
    assert reply(speculator, asked, session) == reply(speculator, asked)
    assert session.reused == len(asked) - 3


@pytest.mark.parametrize("shape", [None, DraftShape(2, 4)])
def test_a_reply_that_is_given_up_between_steps(shape):
    speculator = attached(tiny_model("llama"), shape is not None, shape, **({"drafting": Oracle} if shape else {}))
    session, asked = speculator.session(), text(9, 6)
    expected = reply(speculator, asked)
    if shape is not None:
        speculator._draft.said = expected
    stream = speculator.stream(torch.tensor([asked]), max_new_tokens=NEW, do_sample=False, session=session)
    said = next(stream) + next(stream)
    stream.close()
    assert session.tokens == [*asked, *said[:-1]]
    asked += [*said, *text(5, 7)]
    assert reply(speculator, asked, session) == reply(speculator, asked)
    assert session.reused == len(asked) - 6


def test_an_unfinished_reply_cannot_go_on_after_the_next_prompt():
    speculator = attached(tiny_model("llama"))
    session, ids = speculator.session(), torch.tensor([text(9, 8)])
    stream = speculator.stream(ids, max_new_tokens=NEW, do_sample=False, session=session)
    next(stream)
    expected = reply(speculator, ids[0].tolist()[:5], session)
    with pytest.raises(ValueError, match="a reply that was not finished then cannot go on"):
        next(stream)
    assert expected == reply(speculator, ids[0].tolist()[:5], session)


@pytest.mark.parametrize("failing", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_a_pass_leaves_the_conversation_right(failing, error, monkeypatch):
    """Passes of the second turn: two that read its text, then steps; each fails halfway through the layers."""
    monkeypatch.setattr(reading, "READ_AT_ONCE", 4)
    model = tiny_model("qwen2")
    speculator = attached(model)
    session, asked = speculator.session(), text(9, 9)
    asked += [*reply(speculator, asked, session), *text(6, 10)]
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == failing:
            raise error("enough")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="enough"):
        reply(speculator, asked, session)
    hook.remove()
    for prompt in (asked, [*asked[:12], *text(9, 11)]):
        assert reply(speculator, prompt, session) == reply(speculator, prompt)
        assert session.reused > 8


def test_a_criterion_that_raises_and_a_first_prompt_that_fails():
    class Raises(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] > 14:
                raise OSError("a broken pipe")
            return False

    model = tiny_model("gpt2")
    speculator, asked = attached(model), text(9, 12)
    session = speculator.session()
    with pytest.raises(OSError, match="a broken pipe"):
        reply(speculator, asked, session, stopping_criteria=[Raises()])
    assert reply(speculator, asked, session) == reply(speculator, asked) and session.reused == 8
    hook = model.transformer.h[1].register_forward_pre_hook(lambda *_: 1 / 0)
    session = speculator.session()
    with pytest.raises(ZeroDivisionError):
        reply(speculator, asked, session)
    hook.remove()
    assert reply(speculator, asked, session) == reply(speculator, asked) and session.reused == 0


def test_other_weights_and_another_model_read_everything_again():
    model = tiny_model("llama")
    speculator, asked = attached(model), text(9, 13)
    session = speculator.session()
    asked += [*reply(speculator, asked, session), *text(4, 14)]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    assert reply(speculator, asked, session) == reply(speculator, asked) and session.reused == 0
    assert reply(speculator, asked, session) == reply(speculator, asked) and session.reused > 0
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)  # which no version tells of
    assert reply(speculator, asked, session) == reply(speculator, asked) and session.reused == 0
    other = attached(tiny_model("qwen2"))
    assert reply(other, asked, session) == reply(other, asked) and session.reused == 0
    other.attach_verifier(other.verifier.model)  # another view of the same weights
    assert reply(other, asked, session) == reply(other, asked) and session.reused > 0


FACTORS = [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": FACTORS, "long_factor": FACTORS[::-1], "factor": 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"n_positions": 64}),
        ("opt", {"max_position_embeddings": 64}),
        ("llama", {"max_position_embeddings": 64, "rope_parameters": DYNAMIC}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    ],
)  # fmt: skip
def test_up_to_the_last_position(name, options):
    """Where positions would be computed otherwise the prompt is refused, and the conversation goes on without it."""
    speculator = attached(tiny_model(name, **options))
    session, asked = speculator.session(), text(9, 15)
    for turn in range(3):
        new = 64 - len(asked) if turn == 2 else NEW
        answer = reply(speculator, asked, session, max_new_tokens=new)
        assert answer == reply(speculator, asked, max_new_tokens=new)
        asked += [*answer, *([] if turn == 2 else text(3, turn))]
    assert len(asked) == 64
    with pytest.raises(ValueError, match="exceed the context of 64"):
        reply(speculator, asked, session)
    assert reply(speculator, asked[:40], session) == reply(speculator, asked[:40]) and session.reused == 39


def test_generate_takes_a_session_too():
    speculator = attached(tiny_model("llama"))
    session, ids = speculator.session(), torch.tensor([text(9, 16)])
    for _ in range(2):
        out = speculator.generate(ids, session=session, max_new_tokens=NEW, do_sample=False)
        hooked = speculator.verifier.model.generate(
            ids, custom_generate=speculator, session=speculator.session(), max_new_tokens=NEW, do_sample=False
        )
        assert torch.equal(out, hooked)
        ids = torch.cat([out, torch.tensor([text(4, 17)])], dim=1)
    assert session.reused == 9 + NEW - 1


def test_what_transformers_takes_for_a_pad_is_text_like_any_other():
    speculator = attached(tiny_model("llama"))
    session, asked = speculator.session(), [*text(5, 19), 0, *text(5, 20)]
    for _ in range(2):
        stream = speculator.stream(torch.tensor([asked]), max_new_tokens=NEW, do_sample=False, session=session)
        assert [token for step in stream for token in step] == reply(speculator, asked)


def test_a_batch_and_pads_are_refused():
    speculator = attached(tiny_model("llama"))
    ids = torch.tensor([text(6, 18)]).repeat(2, 1)
    with pytest.raises(ValueError, match="expected one prompt without pads, not 2 with 0"):
        speculator.generate(ids, session=speculator.session(), max_new_tokens=3)
    with pytest.raises(ValueError, match="expected one prompt without pads, not 1 with 2"):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        speculator.generate(ids[:1], mask, session=speculator.session(), max_new_tokens=3)
