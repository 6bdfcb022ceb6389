"""The benchmarks on models small enough to run in seconds."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from recurrent_drafter import DraftShape, RecurrentDrafter, RecurrentDraftingSpeculator
from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.columns import bugs, recorded_rows, rows_of
from recurrent_drafter.bench.contexts import CONTEXT_COLUMNS, StepCell, context_rows, measure_contexts, reached
from recurrent_drafter.bench.engine import Effort, acceptance_along, costs_at, known_replies, measure, teach
from recurrent_drafter.bench.long_replies import LONG_COLUMNS, Windows, long_rows, measure_long_replies, soak
from recurrent_drafter.bench.profile import MIB, STAGES, memory_of, profiled
from recurrent_drafter.bench.workload import (
    SHAPES,
    BenchCell,
    demo_prompts,
    oracle_for,
    random_model,
    random_prompts,
)
from recurrent_drafter.cli.main import launch
from recurrent_drafter.decoding import decode as decode_module
from recurrent_drafter.decoding import speculator as speculator_module
from recurrent_drafter.measure.arms import (
    AUTO,
    HF,
    PLAIN,
    Decoding,
    at_temperature,
    batches_of,
    explaining,
    shape_name,
    standard_arms,
)
from recurrent_drafter.measure.ruler import Arm, compare, verdict
from recurrent_drafter.models.loading import load_verifier

VOCABULARY = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return model


def compared(arms, batches, speculator, decoding):
    return list(compare(arms, batches, explaining(speculator.verifier, decoding)))


def verdicts_of(trials):
    return {row.arm: verdict(row.verdicts) for row in rows_of(trials)}


def tokens_per_step(trials, arm):
    return next(row.tokens_per_step for row in rows_of(trials) if row.arm == arm)


def oracle_on(model, hit_rate, batches, new_tokens):
    speculator = oracle_for(model, hit_rate)
    teach(speculator, batches, new_tokens)
    return speculator


def ragged(batch):
    prompts = random_prompts(VOCABULARY, 3, 12)
    return batches_of([prompt[: 12 - 2 * (i % 3)] for i, prompt in enumerate(prompts)], batch, torch.device("cpu"))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hit_rate", [0.0, 0.6, 0.95])
def test_oracle_decodes_as_its_hits_say(model, hit_rate, batch):
    """The output is the verifier's; at a fixed shape tokens per step are those of the walk along the known hits."""
    batches, decoding, shape = ragged(batch), Decoding(24), DraftShape(3, 4)
    speculator = oracle_on(model, hit_rate, batches, 24)
    arms = standard_arms(speculator, decoding, [shape], lookup=batch == 1)
    trials = compared(arms, batches, speculator, decoding)
    assert set(verdicts_of(trials).values()) == {"yes"}
    assert all(run.count == 24 * batch for trial in trials for run in trial.runs.values())
    replies = known_replies(trials, PLAIN)
    padded = [prompt for batch in batches for prompt in batch.input_ids]  # the oracle knows prompts with their pads
    replies = [type(reply)(prompt, reply.tokens) for prompt, reply in zip(padded, replies, strict=True)]
    expected = acceptance_along(speculator.verifier, speculator.drafter, replies, shape).tokens_per_step(4, 13)
    assert tokens_per_step(trials, shape_name(shape)) == pytest.approx(expected)
    assert tokens_per_step(trials, PLAIN) == 1
    if hit_rate == 0:
        assert expected == 1


def test_expected_tokens_of_a_real_drafter_are_what_decoding_measures(model):
    batches, decoding, shape = ragged(1), Decoding(24), DraftShape(3, 4, 6)
    speculator = RecurrentDraftingSpeculator(RecurrentDrafter(oracle_for(model, 0.0).drafter.config))
    speculator.attach_verifier(model)
    arms = standard_arms(speculator, decoding, [shape], lookup=False)
    trials = compared(arms, batches, speculator, decoding)
    acceptance = acceptance_along(speculator.verifier, speculator.drafter, known_replies(trials, PLAIN), shape)
    assert tokens_per_step(trials, shape_name(shape)) == pytest.approx(acceptance.tokens_per_step(4, 6))


def test_sampled_arms_agree_and_transformers_own_is_timed_only(model):
    batches, decoding = ragged(3), Decoding(16, sampling=at_temperature(1.0), seed=5)
    speculator = oracle_on(model, 0.6, batches, 16)
    arms = standard_arms(speculator, decoding, [DraftShape(2, 3)], lookup=False)
    equality = verdicts_of(compared(arms, batches, speculator, decoding))
    assert equality.pop(HF) == "same law"
    assert set(equality.values()) == {"yes"}


def test_reply_protocol_counts_through_the_end_token(model):
    batches = ragged(3)
    free = standard_arms(oracle_on(model, 0.6, batches, 24), Decoding(24), [], lookup=False)[0]
    ends = [row[5] for row in free.run(batches[0]).ids]
    decoding = Decoding(24, end_ids=tuple(ends))
    speculator = oracle_on(model, 0.6, batches, 24)
    trials = compared(
        standard_arms(speculator, decoding, [DraftShape(2, 3)], lookup=False), batches, speculator, decoding
    )
    assert set(verdicts_of(trials).values()) == {"yes"}
    assert all(len(row) <= 6 for trial in trials for run in trial.runs.values() for row in run.ids)


def test_wrong_output_is_called_a_bug(model):
    batches, decoding = ragged(1), Decoding(8)
    speculator = oracle_on(model, 0.6, batches, 8)
    arms = standard_arms(speculator, decoding, [], lookup=False)
    auto = arms[-1]

    def altered(batch):
        run = auto.run(batch)
        ids = [[(token + (place == 3)) % VOCABULARY for place, token in enumerate(row)] for row in run.ids]
        return dataclasses.replace(run, ids=ids)

    arms[-1] = Arm(AUTO, altered)
    found = list(bugs(compared(arms, batches, speculator, decoding), AUTO))
    assert len(found) == len(batches)
    assert all("token 3" in bug for bug in found)


def test_profile_accounts_for_steps_and_leaves_no_trace(model):
    before = [vars(owner)[name] for places in STAGES.values() for owner, name in places]
    batches = ragged(1)
    speculator = oracle_on(model, 0.6, batches, 16)
    speculator.shape = DraftShape(2, 3)
    decode = decode_module.decode
    with profiled() as profile:
        speculator.generate(batches[0].input_ids, max_new_tokens=16, do_sample=False, eos_token_id=[-1])
    assert profile.steps == speculator.stats.steps
    assert all(profile.seconds[stage] > 0 for stage in ("verify", "draft", "tree", "accept", "cache", "host"))
    assert sum(profile.seconds.values()) <= profile.total
    assert 0 < profile.overhead < 1
    assert [vars(owner)[name] for places in STAGES.values() for owner, name in places] == before
    assert speculator_module.decode is decode


def test_long_replies_are_timed_in_two_windows():
    found = list(measure_long_replies(Windows(early=100, late=200, around=100, replies=1)))
    assert [(measured.arm, measured.penalty) for measured in found] == [
        (arm, penalty) for penalty in (1.0, 1.1) for arm in ("autoregression", "auto")
    ]
    assert all(measured.ratio > 0 and measured.medians[200]["host"] > 0 for measured in found)
    assert all(measured.medians[200]["controller"] > 0 for measured in found if measured.arm == "auto")
    rows = long_rows(found)
    assert len(rows) == 2 * len(found) and {len(row) for row in rows} == {len(LONG_COLUMNS)}


def test_steps_are_timed_with_our_attention_and_the_models_own():
    config = LlamaConfig(
        hidden_size=112,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=128,
    )
    cells = [StepCell(4, 20, 1), StepCell(1, 20, 12), StepCell(1, 90, 12)]
    found = list(measure_contexts(config, cells, rounds=1))
    assert [times.cell for times in found] == cells
    assert all(0 < times.ours_attending < times.ours and 0 < times.own_attending < times.own for times in found)
    assert {len(row) for row in context_rows(found)} == {len(CONTEXT_COLUMNS)}
    slow = dataclasses.replace(found[2], ours=1.6 * found[1].ours)
    batches = [dataclasses.replace(found[0], ours=1.0, own=gain) for gain in (3.9, 4.0)]
    assert list(reached([batches[0], found[1], slow]).values()) == [False, False]
    assert list(reached([batches[1], found[1], dataclasses.replace(slow, ours=found[1].ours)]).values()) == [True, True]


def test_memory_names_the_packed_copy(model):
    batches = ragged(1)
    speculator = oracle_on(model, 0.6, batches, 16)
    arm = standard_arms(speculator, Decoding(16), [], lookup=False)[-1]
    arm.run(batches[0])
    memory = {name: size * MIB for name, size in memory_of(speculator, lambda: arm.run(batches[0])).items()}
    linears = [m for part in (model, speculator.drafter) for m in part.modules() if hasattr(m, "in_features")]
    packed = sum(4 * getattr(m, "forward_weight", m.weight).numel() for m in linears if min(m.weight.shape) >= 64)
    assert 0 <= memory["packed"] <= packed  # of a shape all weights or none, as this machine is faster
    column = 2 * 2 * 4 * 16 * 4  # bytes: keys and values, layers, heads, head width, float32
    assert memory["cache"] >= column * (12 + 16)
    assert memory["cache"] % column == 0
    assert 0 < memory["working"] < MIB
    assert memory["beyond"] == memory["packed"] + memory["working"]


def test_curves_are_measured_at_the_batch(model):
    batches = ragged(3)
    speculator = oracle_on(model, 0.6, batches, 8)
    costs = costs_at(speculator.verifier, speculator.drafter, batches[0], DraftShape(2, 3))
    assert costs.batch == 3 and costs.rows == (3, 6, 9, 12, 15, 18)
    assert list(costs.drafts) == [(2, 1), (2, 2), (2, 3)]
    assert min(*costs.verify, *costs.drafts.values()) > 0


def test_demo_prompts_are_of_exactly_the_length():
    _, tokenizer = load_verifier("demo", dtype="float32")
    prompts = demo_prompts(tokenizer, 4, 200)
    assert [len(prompt) for prompt in prompts] == [200] * 4
    assert len({tuple(prompt[-20:].tolist()) for prompt in prompts}) == 4


def test_a_cell_of_the_demo_model_gives_a_row_for_each_arm():
    records = list(measure(BenchCell("demo/base", "demo", "float32", context=32), Effort(1, 8, profile=True), "cpu"))
    rows = recorded_rows(records)
    assert [row.arm for row in rows][:3] == [HF, "HF prompt lookup", PLAIN]
    assert rows[-1].arm == AUTO
    assert all(verdict(row.verdicts) == "yes" for row in rows)
    assert all(row.attainable >= 1 for row in rows[3:])
    assert {record["kind"] for record in records} == {"run", "curves", "limit", "profile", "memory"}


def test_bench_command(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    arguments = ["--prompts", "2", "--new_tokens", "8", "--dtype", "float32", "--output_file", str(path), "--profile"]
    assert launch("bench", arguments) == 0
    shown = capsys.readouterr().out
    for text in (
        "sustained (exactly 8 new tokens), greedy, float32",
        "HF prompt lookup",
        "fixed 10x4",
        "auto",
        "fixed 10x4, tokens by source: verifier",
        "verify",
    ):
        assert text in shown
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "circumstances"
    assert len(lines) == 1 + 6 * 2
    by_arm = {line["arm"]: line["tokens_by_source"] for line in lines[1:] if "tokens_by_source" in line}
    assert by_arm["fixed 10x4"]["drafter"] > 0 == by_arm["fixed 10x4"]["lookup"] and by_arm["lookup"]["drafter"] == 0
    assert all(sum(counts.values()) == 8 for counts in by_arm.values())


def test_bench_command_in_batches_and_its_refusals(capsys):
    assert (
        launch("bench", ["--prompts", "2", "--batch_size", "2", "--new_tokens", "4", "--dtype", "float32", "--reply"])
        == 0
    )
    assert "left out" in capsys.readouterr().out
    for wrong in (["--batch_size", "0"], ["--new_tokens", "1"], ["--temperature", "-1"], ["--beam_width", "0"]):
        assert launch("bench", wrong) == 2
        assert "expected" in capsys.readouterr().err


def test_generate_shows_a_profile(capsys):
    assert (
        launch("generate", ["--prompt", "Hi", "--max_generation_length", "8", "--dtype", "float32", "--profile"]) == 0
    )
    assert "outside verify and draft" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_tokens_take_no_more_memory():
    model, tokenizer = load_verifier("demo", dtype="float32")
    speculator = RecurrentDraftingSpeculator.from_pretrained(demo_drafter_path(), verifier=model)
    result = soak(speculator, demo_prompts(tokenizer, 1, 128)[0], 10_000, Decoding(128))
    assert result.tokens >= 10_000
    assert result.summary()["memory_growth_mib"] < 8


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHAPES))
def test_random_weights_generate_varied_text(name):
    model = random_model(SHAPES[name](), torch.float32, "cpu")
    prompt = random_prompts(30_000, 1, 128)[0][None]
    output = model.generate(input_ids=prompt, max_new_tokens=64, do_sample=False)
    assert output.shape == (1, 192)
    assert len(output[0, 128:].unique()) >= 20
