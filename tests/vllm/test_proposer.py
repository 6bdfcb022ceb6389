"""Drafts inside vLLM itself: the same tokens, the same law, and as many accepted as foretold."""

import random

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

import torch  # noqa: E402
from engines import DRAFTER, complete, engine, metric, prompts, set_seed  # noqa: E402
from vllm import SamplingParams  # noqa: E402

from recurrent_drafter.assets import demo_drafter_path  # noqa: E402
from recurrent_drafter.measure.replies import HeldOutReplies, Reply  # noqa: E402
from recurrent_drafter.models.config import DraftShape  # noqa: E402
from recurrent_drafter.models.loading import load_drafter, load_verifier  # noqa: E402
from recurrent_drafter.models.verifier import Verifier  # noqa: E402


def mixed_requests(count: int):
    """Requests of many lengths and kinds, and the steps at which they join."""
    choose = random.Random(3)
    texts = prompts(64, 200)
    kinds = (
        {},
        {"stop": [" the", "."]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"logprobs": 3},
        {"min_tokens": 6, "stop_token_ids": [5]},
        {"allowed_token_ids": list(range(0, 4096, 3))},
    )
    requests = []
    for index in range(count):
        ids = texts[index % 64][-choose.randint(3, 200) :]
        length = choose.randint(1, 60)
        options = {"ignore_eos": index % 2 == 0, **kinds[index % len(kinds)]}
        options["min_tokens"] = min(options.get("min_tokens", 0), length)
        requests.append((ids, SamplingParams(temperature=0, max_tokens=length, **options)))
    return requests, [choose.randint(0, count) for _ in range(count)]


@pytest.mark.parametrize("ours", [{"beam_width": 3}, {"beam_width": 1, "shed": True}], ids=["always", "shedding"])
def test_greedy_output_is_that_of_vllm_without_speculation(ours):
    """Joining at random, prompts read 64 tokens at a time, too little cache: 200 requests, no difference."""
    requests, joins = mixed_requests(200)
    crowded = {"max_num_batched_tokens": 64, "kv_cache_memory_bytes": 20 << 20, "max_num_seqs": 16}
    with engine(speculation=False, **crowded) as llm:
        expected = complete(llm, requests, joins)
    with engine(ours=ours, **crowded) as llm:
        found = complete(llm, requests, joins)
        assert metric(llm, "num_preemptions") > 0
        assert metric(llm, "spec_decode_num_accepted_tokens") > 200
    assert [list(output.token_ids) for output in found] == [list(output.token_ids) for output in expected]
    assert [(o.text, o.finish_reason, o.stop_reason) for o in found] == [
        (o.text, o.finish_reason, o.stop_reason) for o in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for here, there in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert here.keys() == there.keys()
            for token in here:
                assert here[token].logprob == pytest.approx(there[token].logprob, abs=2e-3)


def test_up_to_the_end_of_the_context():
    requests = [(ids, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)) for ids in prompts(3, 90)]
    with engine(speculation=False, max_model_len=128) as llm:
        expected = complete(llm, requests)
    with engine(max_model_len=128) as llm:
        found = complete(llm, requests)
    assert [list(o.token_ids) for o in found] == [list(o.token_ids) for o in expected]
    assert all(len(o.token_ids) == 38 for o in found)


def test_replies_that_may_end_once_they_are_long_enough():
    """A stop token at the very place from which on it may end the reply, wherever drafts begin and end."""
    texts = prompts(4, 60)
    with engine(speculation=False) as llm:
        free = complete(llm, [(ids, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)) for ids in texts])
        requests = [
            (
                ids,
                SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, min_tokens=count, stop_token_ids=[stop]),
            )
            for ids, reply in zip(texts, free, strict=True)
            for count, stop in enumerate(list(reply.token_ids)[1:9], start=1)
        ]
        expected = complete(llm, requests)
    with engine() as llm:
        found = complete(llm, requests)
    assert [list(o.token_ids) for o in found] == [list(o.token_ids) for o in expected]


def test_a_checkpoint_serves_by_its_own_name():
    requests = [(ids, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)) for ids in prompts(4, 60)]
    with engine() as llm:
        expected = complete(llm, requests)
    with engine(DRAFTER, speculation=False) as llm:  # nothing but the drafter's folder
        found = complete(llm, requests)
        assert metric(llm, "spec_decode_num_drafts") > 0
    assert [list(o.token_ids) for o in found] == [list(o.token_ids) for o in expected]


def test_as_many_are_accepted_as_along_the_same_replies_offline():
    texts = prompts(12, 128)
    requests = [(ids, SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)) for ids in texts]
    with engine(ours={"beam_width": 1}) as llm:
        outputs = complete(llm, requests)
        served = 1 + metric(llm, "spec_decode_num_accepted_tokens") / metric(llm, "spec_decode_num_drafts")
    model, _ = load_verifier("demo", dtype="float32")
    replies = [Reply(torch.tensor(i), torch.tensor(o.token_ids)) for i, o in zip(texts, outputs, strict=True)]
    drafter = load_drafter(demo_drafter_path(), dtype=torch.float32)
    shape = DraftShape(beam_width=1, beam_length=drafter.config.beam_length)
    foretold = HeldOutReplies(Verifier(model), replies).tokens_per_step(drafter, shape)
    assert served == pytest.approx(foretold, rel=0.05)


TEMPERATURE, TOP_K = 1.2, 4


def law_of_three(prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The exact law of the second to fourth token after a prompt whose first is given, by enumeration."""
    model, _ = load_verifier("demo", dtype="float32")
    prefixes, law = torch.tensor([prompt]), {(): 1.0}
    with torch.inference_mode():
        for _ in range(3):
            logits, best = model(prefixes).logits[:, -1].topk(TOP_K)
            shares = (logits / TEMPERATURE).softmax(-1)
            law = {
                (*path, token): weight * share
                for (path, weight), tokens, row in zip(law.items(), best.tolist(), shares.tolist(), strict=True)
                for token, share in zip(tokens, row, strict=True)
            }
            prefixes = torch.tensor([[*prompt, *path] for path in law])
    return law


@pytest.mark.parametrize("drafts", ["beam", "sampled"])
def test_sampled_law(drafts):
    """Three tokens of thousands of replies against their exact law; top-k leaves 64 outcomes."""
    prompt, count = prompts(1, 48)[0], 4000
    parameters = SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, max_tokens=3, ignore_eos=True)
    first = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    set_seed(11)
    with engine(ours={"drafts": drafts}, max_num_seqs=16, enable_prefix_caching=False) as llm:
        # The first token after a prompt is drawn without a draft, so it is made part of the prompt; and one is drawn.
        [greedy] = complete(llm, [(prompt, first)])
        prompt = [*prompt, *greedy.token_ids]
        outputs = complete(llm, [(prompt, parameters)] * count)
        assert metric(llm, "spec_decode_num_accepted_tokens") > count / 4
    law = law_of_three(prompt)
    counts = dict.fromkeys(law, 0)
    for output in outputs:
        counts[tuple(output.token_ids)] += 1  # a KeyError is a token beyond top-k
    rare = [path for path, share in law.items() if share * count < 5]
    cells = [(law[path] * count, counts[path]) for path in law if path not in rare]
    cells.append((sum(law[path] for path in rare) * count, sum(counts[path] for path in rare)))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells if expected > 0)
    chance = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2))
    assert chance > 0.01


def test_penalties_and_top_p_are_honored_when_sampling():
    """Where top-p leaves one token, and a penalty decides which, sampling has one outcome."""
    texts = prompts(6, 80)
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.6}
    greedy = [(ids, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **penalties)) for ids in texts]
    narrow = [
        (ids, SamplingParams(temperature=1.0, top_p=1e-6, max_tokens=40, ignore_eos=True, **penalties)) for ids in texts
    ]
    with engine(speculation=False) as llm:
        expected = complete(llm, greedy)
    for drafts in ("beam", "sampled"):
        with engine(ours={"drafts": drafts}) as llm:
            found = complete(llm, narrow)
        assert [list(o.token_ids) for o in found] == [list(o.token_ids) for o in expected]


def test_greedy_and_sampling_requests_side_by_side():
    texts = prompts(12, 100)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    sampled = SamplingParams(temperature=0.9, top_k=20, max_tokens=40, ignore_eos=True)
    with engine(speculation=False) as llm:
        expected = complete(llm, [(ids, greedy) for ids in texts[::2]])
    for drafts in ("beam", "sampled"):
        with engine(ours={"drafts": drafts}, max_num_batched_tokens=48, enable_chunked_prefill=True) as llm:
            requests = [(ids, sampled if index % 2 else greedy) for index, ids in enumerate(texts)]
            found = complete(llm, requests, joins=list(range(0, 36, 3)))
        assert [list(o.token_ids) for o in found[::2]] == [list(o.token_ids) for o in expected]
        assert all(len(o.token_ids) == 40 for o in found)
