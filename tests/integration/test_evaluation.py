"""MT-Bench with the demo model: what is asked, counted, compared and kept."""

import json
from pathlib import Path

import pytest
import torch

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.cli.main import launch
from recurrent_drafter.data.dialogues import Turn
from recurrent_drafter.data.questions import load_questions
from recurrent_drafter.data.templates import encode_prompt
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure import arms

FEW = ["--eval_mt_bench", "--max_num_prompts", "3", "--max_generation_length", "12", "--dtype", "float32"]
LABELS = (
    *("Method: Speculative", "Total prompts: 6", "Total tokens: ", "Total time: ", "Average tokens/prompt: "),
    *("Overall tokens/sec: ", "Tokens/step: ", "Acceptance rate: ", "Acceptance by position: "),
)
FIXED = ["--beam_width", "3", "--beam_length", "4"]


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_verifier_path())


def evaluate(folder: Path, *flags: str, code: int = 0) -> dict:
    file = folder / f"{len(list(folder.iterdir()))}.json"
    assert launch("generate", [*FEW, "--output_file", str(file), *flags]) == code
    return json.loads(file.read_text())


def answers(record: dict, arm: str) -> dict[tuple[str, int], dict]:
    return {(a["question"], a["turn"]): a for batch in record["arms"][arm] for a in batch["answers"]}


def ids(record: dict, arm: str) -> dict[tuple[str, int], list[int]]:
    return {key: answer["ids"] for key, answer in answers(record, arm).items()}


def test_two_runs_joined_are_the_comparison(tmp_path, capsys, tokenizer):
    both = evaluate(tmp_path, "--compare", "--batch_size", "2", *FIXED)
    assert "Identical output: yes, 6 of 6 prompts (float32)" in capsys.readouterr().out
    assert both["complete"] and both["figures"]["identical"] == 6 and both["draft_shape"]["beam_width"] == 3
    assert both["argv"][0] == "generate_speculator.py" and {"commit", "versions", "hardware"} <= both.keys()

    speculative = evaluate(tmp_path, "--batch_size", "2", *FIXED)
    out = capsys.readouterr().out
    for label in LABELS:
        assert f"   {label}" in out
    evaluate(tmp_path, "--batch_size", "2", "--autoregressive")
    assert ids(both, "speculative") == ids(both, "autoregressive") == ids(speculative, "speculative")
    capsys.readouterr()
    assert launch("bench", ["--join", str(tmp_path / "1.json"), str(tmp_path / "2.json")]) == 0
    out = capsys.readouterr().out
    assert "Identical output: yes, 6 of 6 prompts" in out and "Speedup: " in out
    assert "Speculative: " in out and "Autoregressive: " in out

    # steps, drafts and prompts are what they say
    questions = {question.name: question for question in load_questions()}
    for (name, turn), answer in answers(both, "speculative").items():
        accepted = sum(answer["acceptance"]["accepted"])
        assert answer["steps"] <= len(answer["ids"]) - 1 <= answer["steps"] + accepted
        assert len(answer["acceptance"]["drafted"]) <= 4
        asked = [Turn("user", questions[name].turns[0])]
        if turn == 2:
            reply = answers(both, "speculative")[name, 1]["text"]
            asked += [Turn("assistant", reply), Turn("user", questions[name].turns[1])]
        assert answer["prompt_tokens"] == len(encode_prompt(asked, tokenizer))


def test_sampled_answers_depend_on_the_seed_alone(tmp_path):
    warm = ["--temperature", "1.2", "--top_p", "0.95", "--seed", "3"]
    one = evaluate(tmp_path, *warm, "--batch_size", "1", "--compare")
    assert one["figures"]["identical"] == 6 and one["settings"]["top_p"] == 0.95
    assert ids(one, "speculative") == ids(evaluate(tmp_path, *warm, "--batch_size", "3", *FIXED), "speculative")
    other = evaluate(tmp_path, *warm[:-1], "4")
    assert ids(one, "speculative") != ids(other, "speculative")
    few = evaluate(tmp_path, *warm, "--max_num_prompts", "1")
    assert ids(few, "speculative").items() <= ids(one, "speculative").items()


def test_what_does_not_fit_is_named(tmp_path, capsys):
    whole = answers(evaluate(tmp_path), "speculative")
    lengths = sorted(answer["prompt_tokens"] for (_, turn), answer in whole.items() if turn == 1)
    record = evaluate(tmp_path, "--max_prompt_length", str(lengths[1]))
    out = capsys.readouterr().out
    assert {skipped["turn"] for skipped in record["skipped"]} == {1, 2}
    assert len(record["skipped"]) + len(ids(record, "speculative")) == record["prompts"] == 6
    for skipped in record["skipped"]:
        assert f"question {skipped['question']}, turn {skipped['turn']}: {skipped['reason']}" in out
    assert f"{lengths[2]} tokens, {lengths[1]} at most" in out and "an earlier turn was skipped" in out
    nothing = evaluate(tmp_path, "--max_prompt_length", "3", "--compare")
    assert len(nothing["skipped"]) == 6 and nothing["complete"]


def test_ctrl_c_keeps_what_every_arm_has_answered(tmp_path, capsys, monkeypatch):
    real, calls = RecurrentDraftingSpeculator.generate, []

    def generate_until(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 2 * (2 + 2 + 1) + 1:  # two to warm up, two rounds of two arms but for the last; each two calls
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(RecurrentDraftingSpeculator, "generate", generate_until)
    record = evaluate(tmp_path, "--compare", code=130)
    assert not record["complete"] and record["figures"]["complete"] == 0
    assert ids(record, "speculative").keys() == ids(record, "autoregressive").keys() == {("81", 1)}
    assert "INTERRUPTED after 1 of 6 prompts" in capsys.readouterr().out


def test_what_was_answered_before_a_failure_is_kept(tmp_path, monkeypatch):
    real, calls = RecurrentDraftingSpeculator.generate, []

    def generate_until(self, *arguments, **options):
        calls.append(None)
        if len(calls) == 2 * 2 + 1:  # one to warm up and one round, of two calls each
            raise RuntimeError("out of memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(RecurrentDraftingSpeculator, "generate", generate_until)
    with pytest.raises(RuntimeError, match="out of memory"):
        launch("generate", [*FEW, "--output_file", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert not record["complete"] and list(answers(record, "speculative")) == [("81", 1)]


def test_a_token_that_differs_is_a_bug(tmp_path, capsys, monkeypatch):
    real = arms.until_end

    def wrong(reply, end_ids):
        found = real(reply, end_ids)
        if wrong.calls == 3:  # after two to warm up, and the reference
            found[5] = 4003
        wrong.calls += 1
        return found

    wrong.calls = 0
    monkeypatch.setattr(arms, "until_end", wrong)
    record = evaluate(tmp_path, "--compare", "--max_num_prompts", "1", code=1)
    outcomes = {key: answer["outcome"] for key, answer in answers(record, "speculative").items()}
    assert outcomes == {("81", 1): "bug", ("81", 2): "other prompt"} and record["figures"]["bug"] == 1
    out = capsys.readouterr().out
    assert "DIFFERS: speculative, question 81, turn 1: token 5, BUG" in out and "Identical output: NO" in out


def test_a_prompt_compared(tmp_path, capsys):
    file = tmp_path / "one.json"
    prompt = ["--prompt", "I need a table for two.", "--compare", "--max_generation_length", "12"]
    assert launch("generate", [*prompt, "--output_file", str(file)]) == 0
    assert "Identical output: yes, 1 of 1 prompts" in capsys.readouterr().out
    assert json.loads(file.read_text())["settings"]["questions"] == "--prompt"


def test_accepted_drafts_are_counted_step_by_step(tokenizer):
    from transformers import AutoModelForCausalLM

    from recurrent_drafter import DraftShape
    from recurrent_drafter.assets import demo_drafter_path

    model = AutoModelForCausalLM.from_pretrained(demo_verifier_path(), dtype=torch.float32)
    shape = DraftShape(3, 4)
    speculator = RecurrentDraftingSpeculator.from_pretrained(demo_drafter_path(), verifier=model, shape=shape)
    prompt = encode_prompt([Turn("user", "I need a table for two in San Jose.")], tokenizer)[None]
    emitted = list(speculator.stream(prompt, max_new_tokens=40, do_sample=False, end_ids=[]))
    (drafts,) = speculator.stats.drafts
    assert len(drafts) == speculator.stats.steps == len(emitted) - 1
    assert [accepted + 1 for _, accepted in drafts[:-1]] == [len(tokens) for tokens in emitted[1:-1]]
    assert all(drafted == 4 for drafted, _ in drafts[:-4]) and any(accepted for _, accepted in drafts)
