"""Training from Python: what the reference shows, from prompts alone, with progress, stopped and resumed; silently."""

import dataclasses
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model

from recurrent_drafter import RecurrentDrafter, RecurrentDraftingSpeculator
from recurrent_drafter.data.dialogues import Dialogue, Turn
from recurrent_drafter.data.sources import divide_dialogues
from recurrent_drafter.measure.replies import load_replies
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.training import (
    Progress,
    TrainedDrafter,
    TrainingArguments,
    TrainingEstimate,
    estimate,
    evaluate,
    targets,
    train,
)

REFERENCE = Path(__file__).parents[2] / "docs/api.md"


@pytest.fixture(scope="module")
def tokenizer():
    return load_verifier("demo")[1]


@pytest.fixture
def model(tokenizer):
    """A tiny random model that speaks the demo model's tokens."""
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)


def talks(count=24):
    """Short conversations, all different."""
    return [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(count)
    ]


def arguments(folder, **options):
    defaults = {
        "max_steps": 6, "logging_steps": 1, "model_max_length": 64, "eval_max_examples": 2, "eval_max_new_tokens": 12,
        "draft_vocab_size": "300", "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True,
        "drafter_predict_n_tokens": 3,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def same_weights(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_the_lines_of_the_reference(model, tokenizer, tmp_path, monkeypatch, capsys):
    """At most ten; they leave a drafter that decodes exactly, and that loads from its folder."""
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"^## Training\n.*?^```python\n(.*?)^```", REFERENCE.read_text(), re.S | re.M)
    assert len(lines.splitlines()) <= 10
    names = {"model": model, "tokenizer": tokenizer, "dialogues": talks()}
    exec(lines, names)
    trained = names["trained"]
    assert 1 <= trained.figures["tokens_per_step"] <= 6 and trained.finished and trained.steps == 200
    assert f"{trained.figures['tokens_per_step']} models/mine" in capsys.readouterr().out
    loaded = RecurrentDrafter.from_pretrained(trained.folder, dtype=torch.float32)
    assert same_weights(loaded, trained.drafter)
    prompt = tokenizer("What is 7?", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert len(set(expected[0].tolist())) > 20
    assert torch.equal(names["speculator"].generate(**prompt, max_new_tokens=40, do_sample=False), expected)
    mine = RecurrentDraftingSpeculator(trained.drafter)
    mine.attach_verifier(model)
    assert torch.equal(mine.generate(**prompt, max_new_tokens=40, do_sample=False), expected)


def test_prompts_are_answered_by_the_verifier_and_the_replies_are_learned_from(model, tokenizer, tmp_path):
    said = []
    prompts = [f"Say {n}." for n in range(12)]
    trained = train(model, prompts, arguments(tmp_path), tokenizer=tokenizer, on_progress=lambda p: said.append(str(p)))
    assert "the data given has questions only: the verifier's own greedy replies are the answers" in said
    assert trained.figures["tokens_per_step"] >= 1
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"]["source"] == "the data given" and record["data"]["kept"] == 11 and record["argv"] == []


def test_dialogues_and_records_are_the_same_data(model, tokenizer, tmp_path):
    given = [Dialogue(tuple(Turn(**message) for message in talk["messages"])) for talk in talks()]
    one, other = (
        train(model, data, arguments(tmp_path / name), tokenizer=tokenizer)
        for name, data in (("records", talks()), ("dialogues", given))
    )
    assert same_weights(one.drafter, other.drafter) and one.folder != other.folder


def test_the_quick_way_learns_from_the_verifiers_own_text(model, tokenizer, tmp_path, monkeypatch):
    for name, value in {"QUICK_SECONDS": 8, "QUICK_TEXT_SECONDS": 1, "QUICK_REPLIES": 8}.items():
        monkeypatch.setattr(targets, name, value)
    monkeypatch.setattr(targets, "QUICK_REPLY_TOKENS", 24)
    asked = arguments(tmp_path, quick=True, max_steps=-1, drafter_predict_n_tokens=None)
    trained = train(model, [f"Say {n}." for n in range(20)], asked, tokenizer=tokenizer)
    replies = load_replies(tmp_path / "text.safetensors")
    assert {len(reply.tokens) for reply in replies} == {24}
    expected = model.generate(input_ids=replies[0].prompt[None], max_new_tokens=24, do_sample=False)
    assert torch.equal(expected[0, len(replies[0].prompt) :], replies[0].tokens)
    assert trained.steps > 0 and asked.num_train_epochs == 3, "the caller's options stay as they are"


def test_progress_is_told_in_order(model, tokenizer, tmp_path):
    told: list[Progress] = []
    asked = arguments(tmp_path, use_distilled_dataset=True, eval_strategy="steps", eval_steps=3)
    train(model, talks(), asked, tokenizer=tokenizer, on_progress=told.append)
    phases = [phase for phase, _ in itertools.groupby(progress.phase for progress in told)]
    assert phases == ["data", "targets", "distilling", "targets", "evaluation", "targets", "training"]
    steps = [progress for progress in told if progress.phase == "training" and progress.done is not None]
    counts = [done for done, _ in itertools.groupby(step.done for step in steps)]  # an evaluation tells it twice
    assert counts == list(range(7)) and {progress.total for progress in steps} == {6}
    assert "held-out tokens/step" in steps[-1].text
    sentences = [progress.text for progress in told if progress.phase == "training" and progress.done is None]
    assert [re.match(r"step (\d): held-out tokens/step \d\.\d\d, loss", text)[1] for text in sentences] == ["3", "6"]


def test_a_stop_saves_a_checkpoint_and_resuming_ends_with_the_same_weights(model, tokenizer, tmp_path):
    whole = train(model, talks(), arguments(tmp_path / "whole"), tokenizer=tokenizer)
    asked = iter([False, False, True])
    broken = arguments(tmp_path / "broken")
    stopped = train(model, talks(), broken, tokenizer=tokenizer, should_stop=lambda: next(asked))
    assert not stopped.finished and stopped.steps == 3 and stopped.figures == {}
    assert [path.name for path in stopped.folder.iterdir() if path.is_dir()] == ["checkpoint-3"]
    assert not (stopped.folder / "model.safetensors").exists()
    again = dataclasses.replace(broken, resume_from_checkpoint=True)
    resumed = train(model, talks(), again, tokenizer=tokenizer)
    assert resumed.finished and resumed.steps == 6 and same_weights(resumed.drafter, whole.drafter)
    assert resumed.figures["tokens_per_step"] == whole.figures["tokens_per_step"]


def test_evaluation_gives_the_figures_again_and_an_estimate_writes_nothing(model, tokenizer, tmp_path):
    trained = train(model, talks(), arguments(tmp_path / "mine"), tokenizer=tokenizer)
    again = evaluate(model, str(trained.folder), talks(), arguments(tmp_path / "again"), tokenizer=tokenizer)
    machine = {"predicted_speedup", "break_even"}
    assert {k: v for k, v in again.figures.items() if k not in machine} == {
        k: v for k, v in trained.figures.items() if k not in machine
    }
    assert (tmp_path / "again/evaluation.json").exists()
    found = estimate(model, talks(), arguments(tmp_path / "none", max_steps=-1), tokenizer=tokenizer)
    assert isinstance(found, TrainingEstimate) and not (tmp_path / "none").exists()
    texts = len(divide_dialogues(talks(), "train").dialogues)
    assert found.steps == 3 * texts / 2 and len(found.break_evens) == 3 and found.step_seconds > 0
    assert found.ceiling(1.0)[0] >= found.ceiling(0.5)[0] >= 1


def test_nothing_is_printed_and_no_signal_is_taken(model, tokenizer, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    while_training = []

    def stop():
        while_training.append(signal.getsignal(signal.SIGINT))
        return False

    trained = train(model, talks(), arguments(tmp_path), tokenizer=tokenizer, should_stop=stop)
    assert isinstance(trained, TrainedDrafter)
    assert set(while_training) == {before} and signal.getsignal(signal.SIGINT) == before
    assert capsys.readouterr() == ("", "")


def test_options_load_neither_torch_nor_transformers():
    code = "import sys, recurrent_drafter.training.options; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_cannot_be_is_refused_in_one_line(model, tokenizer, tmp_path):
    for message, options, keywords in (
        ("give its tokenizer too", {}, {}),
        ("leave them out", {"dataset_path": "x.jsonl"}, {"tokenizer": tokenizer}),
        ("--model_max_length is 4000", {"model_max_length": 4000}, {"tokenizer": tokenizer}),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            train(model, talks(), arguments(tmp_path, **options), **keywords)
        assert "\n" not in str(raised.value)
    with pytest.raises(OSError, match=r"no drafter at \./nowhere"):
        evaluate(model, "./nowhere", talks(), arguments(tmp_path), tokenizer=tokenizer)
