"""Sampled output: the verifier's own law, and with the same seed the same tokens whatever is drafted."""

import itertools

import pytest
import torch
from models import VOCABULARY, WIDTH, generate, prompts, random_drafter, tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
)

from recurrent_drafter import DraftShape, RecurrentDrafter, RecurrentDraftingConfig, RecurrentDraftingSpeculator
from recurrent_drafter.core.noise import draw_tokens, gumbel_noise

SHAPES = (DraftShape(3, 4), DraftShape(4, 5, 8), DraftShape(1, 2))


class AvoidLast(LogitsProcessor):
    """Reads the prefix and asks for its row: the last token, and the row's own number, become less likely."""

    def __call__(self, input_ids, scores):
        scores = scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -3.0))
        rows = torch.arange(len(scores))[:, None] + 1
        return scores.scatter_add(1, rows, torch.full_like(scores[:, :1], 2.0))


WAYS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8, "temperature": 1.3},
    "min-p": {"min_p": 0.05},
    "typical": {"typical_p": 0.7},
    "repetition": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5, 6], [7]]},
    "bias": {"sequence_bias": [[[3], 2.0], [[4, 9], -4.0]]},
    "all": {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "custom": {"logits_processor": LogitsProcessorList([AvoidLast()])},
}


def plain():
    return RecurrentDraftingSpeculator(lookup=False)


def sampled(model, ids, mask, speculator, seed=7, new=24, row_ids=None, **options):
    speculator.attach_verifier(model)
    options = {"do_sample": True, "top_k": 0, **options}
    return speculator.generate(ids, mask, seed=seed, row_ids=row_ids, max_new_tokens=new, **options)


@pytest.mark.parametrize("way", list(WAYS))
def test_same_seed_same_tokens_with_and_without_speculation(way):
    model = tiny_model("llama")
    ids, mask = prompts(4)
    expected = sampled(model, ids, mask, plain(), **WAYS[way])
    assert not torch.equal(expected, generate(model, ids, mask, new=24)), "something must be drawn"
    for shape in (*SHAPES, None):
        speculator = RecurrentDraftingSpeculator(random_drafter(), shape)
        assert torch.equal(sampled(model, ids, mask, speculator, **WAYS[way]), expected)
    assert not torch.equal(sampled(model, ids, mask, plain(), seed=8, **WAYS[way]), expected)


@pytest.mark.parametrize("way", ["plain", "all"])
def test_order_of_rows_and_batching_change_nothing(way):
    model = tiny_model("gpt2")
    ids, mask = prompts(4)
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    together = sampled(model, ids, mask, speculator, **WAYS[way])
    order = [2, 0, 3, 1]
    permuted = sampled(model, ids[order], mask[order], speculator, row_ids=order, **WAYS[way])
    assert torch.equal(permuted, together[order])
    for row in range(4):
        alone = sampled(model, ids[row, None], mask[row, None], speculator, row_ids=[row], **WAYS[way])
        assert torch.equal(alone[0], together[row])
    same_id = sampled(model, ids[[0, 0]], mask[[0, 0]], speculator, row_ids=[0, 0], **WAYS[way])
    assert torch.equal(same_id[0], same_id[1])


def test_several_sequences_of_one_prompt_are_rows_of_their_own():
    model = tiny_model("llama")
    ids, mask = prompts(1)
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    three = sampled(model, ids, mask, speculator, num_return_sequences=3)
    assert len({tuple(row) for row in three.tolist()}) == 3
    for row in range(3):
        assert torch.equal(sampled(model, ids, mask, speculator, row_ids=[row])[0], three[row])


def test_without_a_seed_torchs_generator_decides():
    model = tiny_model("llama")
    ids, mask = prompts(1)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(sampled(model, ids, mask, plain(), seed=None))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 15, "eos_token_id": list(range(1, 60))},
        {"forced_eos_token_id": 5, "eos_token_id": 5},
        {"exponential_decay_length_penalty": (5, 1.05), "eos_token_id": [1, 2, 3]},
        {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [4, 5, 6, 7]},
        {"logits_processor": LogitsProcessorList([AvoidLast()])},
        {"prefix_allowed_tokens_fn": lambda row, text: list(range(row, 60 + 7 * row + len(text) % 5))},
    ],
)
def test_processors_act_in_greedy_decoding_as_in_transformers(options):
    model = tiny_model("llama")
    ids, mask = prompts(3)
    expected = generate(model, ids, mask, **options)
    assert not torch.equal(expected, generate(model, ids, mask)), "the option must matter"
    for speculator in (
        plain(),
        RecurrentDraftingSpeculator(random_drafter(), SHAPES[1]),
    ):
        assert torch.equal(generate(model, ids, mask, custom_generate=speculator, **options), expected)


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Upper tail of Pearson's statistic; cells that expect fewer than five are put together."""
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2), statistic / 2))


@pytest.mark.parametrize("way", [{}, {"temperature": 0.7, "top_k": 4}])
def test_law_of_three_tokens_of_two_rows_is_the_verifiers(way):
    """All 5^3 replies of each of two prompts, weighed exactly; then all 25 pairs of the two rows' first tokens."""
    vocabulary, length, copies, seeds = 5, 3, 100, 40
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    ids = torch.tensor([[1, 2, 3], [4, 0, 2]])
    drafter = RecurrentDrafter(RecurrentDraftingConfig(hidden_size=16, vocab_size=vocabulary)).eval()
    speculator = RecurrentDraftingSpeculator(drafter, DraftShape(2, 2))
    counts = torch.zeros(2, *[vocabulary] * length, dtype=torch.float64)
    pairs = torch.zeros(vocabulary, vocabulary, dtype=torch.float64)
    for seed in range(seeds):
        output = sampled(model, ids.repeat_interleave(copies, 0), None, speculator, seed=seed, new=length, **way)
        replies = output[:, 3:].view(2, copies, length)
        for row in range(2):
            counts[row].index_put_(tuple(replies[row].T), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
        pairs.index_put_((replies[0, :, 0], replies[1, :, 0]), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
    assert speculator.stats.tokens_per_step > 1.05, "drafts must be accepted"
    for row in range(2):
        law = torch.zeros([vocabulary] * length, dtype=torch.float64)
        for reply in itertools.product(range(vocabulary), repeat=length):
            law[reply] = exact_probability(model, ids[row], reply, way)
        assert law.sum() == pytest.approx(1)
        assert chi_square_p(counts[row].flatten(), law.flatten() * copies * seeds) > 0.001
    first = [counts[row].sum((1, 2)) / (copies * seeds) for row in range(2)]
    assert chi_square_p(pairs.flatten(), torch.outer(*first).flatten() * copies * seeds) > 0.001


def exact_probability(model, prompt, reply, way):
    text, probability = prompt, 1.0
    for token in reply:
        with torch.no_grad():
            scores = model(text[None]).logits[0, -1].double() / way.get("temperature", 1.0)
        if "top_k" in way:
            scores[scores < scores.topk(way["top_k"]).values[-1]] = -torch.inf
        probability *= float(scores.softmax(-1)[token])
        text = torch.cat([text, torch.tensor([token])])
    return probability


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_law_of_a_real_models_first_three_tokens():
    """100,000 replies of the demo model, with its drafter, against as many of transformers' own sampling."""
    from recurrent_drafter.assets import demo_drafter_path
    from recurrent_drafter.models.loading import load_verifier

    model, tokenizer = load_verifier("demo", dtype="float32")
    speculator = RecurrentDraftingSpeculator.from_pretrained(
        demo_drafter_path(), verifier=model, shape=DraftShape(3, 3)
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([text])
    batch, rounds = 500, 200
    way = {"do_sample": True, "top_k": 4, "temperature": 1.5, "max_new_tokens": 3, "num_return_sequences": batch}
    counts = []
    for theirs in (False, True):
        torch.manual_seed(0)
        seen: dict[tuple, int] = {}
        for number in range(rounds):
            output = model.generate(ids, **way) if theirs else speculator.generate(ids, seed=number, **way)
            for reply in map(tuple, output[:, ids.shape[1] :].tolist()):
                seen[reply] = seen.get(reply, 0) + 1
        counts.append(seen)
    cells = sorted(set(counts[0]) | set(counts[1]))
    ours, hf = (torch.tensor([float(count.get(cell, 0)) for cell in cells]).double() for count in counts)
    common = ours + hf >= 20
    statistic = ((ours - hf)[common] ** 2 / (ours + hf)[common]).sum()
    p = float(torch.special.gammaincc(torch.tensor((int(common.sum()) - 1) / 2).double(), statistic / 2))
    assert common.sum() >= 20
    assert p > 0.001, p


def test_noise_is_gumbel_and_independent_in_every_argument():
    rows, positions, tokens = (torch.arange(40) for _ in range(3))
    noise = gumbel_noise(11, rows[:, None, None], positions[:, None], tokens)
    uniform = torch.exp(-torch.exp(-noise))
    ordered = uniform.flatten().sort().values
    steps = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert (ordered - steps).abs().max() < 1.63 / len(ordered) ** 0.5  # Kolmogorov-Smirnov at 1 %
    centered = uniform - uniform.mean()
    for axis in range(3):
        neighbors = (centered.narrow(axis, 0, 39) * centered.narrow(axis, 1, 39)).mean() / centered.pow(2).mean()
        assert neighbors.abs() < 4 / (39 * 1600) ** 0.5
    other = torch.exp(-torch.exp(-gumbel_noise(12, rows[:, None, None], positions[:, None], tokens)))
    assert (centered * (other - other.mean())).mean().abs() / centered.pow(2).mean() < 4 / 40**1.5


def test_a_token_of_no_probability_is_never_drawn():
    scores = torch.full((2, 50), -torch.inf)
    scores[0, 17], scores[1, 3:5] = 0.0, -40.0
    for seed in range(20):
        first, second = draw_tokens(scores, seed, torch.tensor([0, 1]), torch.tensor([0, 0])).tolist()
        assert first == 17
        assert second in (3, 4)


class Words:
    """A tokenizer's stand-in for streamers: a token is its number."""

    def decode(self, tokens, **_):
        return "".join(f"{int(token)} " for token in tokens)


def test_streamers_and_the_iterator_give_the_output():
    model = tiny_model("llama")
    ids, mask = prompts(1)
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    expected = sampled(model, ids, mask, speculator)[0, 12:].tolist()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    sampled(model, ids, mask, speculator, streamer=streamer)
    assert "".join(streamer).split() == [str(token) for token in expected]
    steps = speculator.stream(ids, mask, seed=7, do_sample=True, top_k=0, max_new_tokens=24)
    collected = []
    for step in steps:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not any("forward" in vars(module) for module in model.modules()), "between steps the model is as it was"
        collected += step
    assert collected == expected
    with pytest.raises(ValueError, match="a batch of 2"):
        speculator.stream(*prompts(2), max_new_tokens=4)
    with pytest.raises(ValueError, match="one sequence, and the batch has 2"):
        speculator.generate(*prompts(2), max_new_tokens=4, streamer=streamer)


def test_return_dict_and_max_time():
    model = tiny_model("gpt2")
    ids, mask = prompts(2)
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    result = generate(model, ids, mask, custom_generate=speculator, return_dict_in_generate=True)
    assert torch.equal(result.sequences, generate(model, ids, mask))
    stopped = generate(model, ids, mask, new=200, custom_generate=speculator, max_time=0.0)
    assert stopped.shape[1] == 13, "time is up after the first token, as in transformers"


def test_stop_strings_end_the_reply_where_transformers_ends_it():
    from recurrent_drafter.models.loading import load_verifier

    model, tokenizer = load_verifier("demo", dtype="float32")
    ids = tokenizer("I would like to book a table for two", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    text = tokenizer.decode(plain[0, ids.shape[1] + 5 :], skip_special_tokens=False)
    stop_strings = [text[20:26]]
    options = {"max_new_tokens": 40, "do_sample": False, "stop_strings": stop_strings, "tokenizer": tokenizer}
    expected = model.generate(ids, **options)
    assert expected.shape[1] < plain.shape[1]
    from recurrent_drafter.assets import demo_drafter_path

    speculator = RecurrentDraftingSpeculator.from_pretrained(
        demo_drafter_path(), verifier=model, shape=DraftShape(3, 5)
    )
    assert torch.equal(speculator.generate(ids, **options), expected)
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        speculator.generate(ids, max_new_tokens=4, stop_strings=["x"])


def test_logits_that_are_no_numbers_are_named_with_their_place():
    model = tiny_model("llama")
    ids, mask = prompts(2)
    real = model.lm_head.forward
    calls = []

    def broken(hidden):
        logits = real(hidden)
        calls.append(logits.shape)
        if len(calls) > 3:
            logits[1] = torch.nan
        return logits

    model.lm_head.forward = broken
    with pytest.raises(ValueError, match=r"NaN in row 1, at token 3 of the reply"):
        generate(model, ids, mask, custom_generate=plain())
    calls.clear()
    with pytest.raises(ValueError, match="NaN in row 1"):
        sampled(model, ids, mask, RecurrentDraftingSpeculator(random_drafter(), SHAPES[0]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (DraftShape(VOCABULARY + 1, 2), f"beam_width is {VOCABULARY + 1}, expected 1 to {VOCABULARY}"),
        (DraftShape(2, 244), "beam_length is 244, expected at most 243"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, message):
    ids, mask = prompts(1)
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("llama"), ids, mask, custom_generate=RecurrentDraftingSpeculator(random_drafter(), shape))


def test_a_drafter_moved_to_another_dtype_is_refused():
    ids, mask = prompts(1)
    model = tiny_model("llama")
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    speculator.attach_verifier(model)
    speculator.drafter.to(torch.bfloat16)
    with pytest.raises(ValueError, match="the drafter is torch.bfloat16 on cpu, the verifier torch.float32"):
        generate(model, ids, mask, custom_generate=speculator)
    assert WIDTH == speculator.drafter.config.hidden_size


def test_wrong_row_ids_are_refused():
    model = tiny_model("llama")
    ids, mask = prompts(2)
    with pytest.raises(ValueError, match="row_ids has 1 entries, expected one per row of the batch: 2"):
        sampled(model, ids, mask, plain(), row_ids=[0])


def test_pads_after_a_prompt_and_positions_of_ones_own_are_refused():
    model = tiny_model("gpt2")
    ids, mask = prompts(2)
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    for row in (0, 1):
        after = mask.clone()
        after[row, -1] = 0
        with pytest.raises(ValueError, match=f"row {row} of the prompts ends in a pad"):
            generate(model, ids, after, custom_generate=speculator)
    with pytest.raises(ValueError, match="position_ids other than"):
        generate(model, ids[:1], mask[:1], custom_generate=speculator, position_ids=torch.arange(12)[None] + 3)
    with pytest.raises(ValueError, match="seed is 1.5, expected an integer"):
        sampled(model, ids, mask, speculator, seed=1.5)


@pytest.mark.parametrize("change", ["data", "in place", "new embeddings"])
def test_a_model_that_was_changed_after_attaching_is_decoded_as_it_is(change):
    model = tiny_model("llama")
    ids, mask = prompts(1)
    speculator = RecurrentDraftingSpeculator(random_drafter(), SHAPES[0])
    before = generate(model, ids, mask, custom_generate=speculator)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        if change == "data":
            layer.weight.data.mul_(1.5)  # such a change leaves the weight's version as it was
        elif change == "in place":
            layer.weight.mul_(1.5)
        else:
            model.set_input_embeddings(torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.flip(0)))
    expected = generate(model, ids, mask)
    assert not torch.equal(expected, before)
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)
