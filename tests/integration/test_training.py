"""Training on tiny verifiers: the methods, what evaluation reports, and what survives a kill."""

import errno
import json
import math

import pytest
import torch
from models import VOCABULARY, prompts, random_drafter, tiny_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import verifier_fingerprint
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.checkpoints import last_checkpoint, saying_what_was_not_written
from recurrent_drafter.training.examples import run_fingerprint, with_text_targets
from recurrent_drafter.training.loss import Distillation
from recurrent_drafter.training.trainer import DrafterTrainer

SHAPE = DraftShape(2, 4)


def replies_of(verifier, count, new=24):
    return greedy_replies(verifier, [prompts(1, seed)[0][0] for seed in range(count)], new, ())


def arguments(path, **options):
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(path), **{**defaults, **options})


def trainer_of(verifier, path, *, drafter=None, examples=None, held_out=None, trainer=None, **options):
    if examples is None:
        examples = [with_text_targets(reply.as_example(), 4, ()) for reply in replies_of(verifier, 6)]
    return DrafterTrainer(
        drafter or random_drafter(),
        arguments(path, **options),
        verifier=verifier,
        train_examples=examples,
        held_out=held_out,
        shape=SHAPE,
        **(trainer or {}),
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2-mixed", "cohere"])
def test_logits_of_hiddens_are_the_models_own(name):
    model = tiny_model(name)
    verifier = Verifier(model)
    ids = prompts(1)[0]
    with torch.inference_mode():
        logits = verifier.logits(verifier.hiddens(ids))
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft_ids", [list(range(VOCABULARY)), list(range(0, VOCABULARY, 2))])
@pytest.mark.parametrize("name", ["gpt2", "gemma2-mixed"])
def test_knowledge_distillation_against_a_plain_loop(name, draft_ids, tmp_path):
    """Every depth at every root, from full logits, by the definition."""
    model = tiny_model(name)
    verifier = Verifier(model)
    drafter = random_drafter(draft_vocab_size=len(draft_ids))
    drafter.draft_ids.copy_(torch.tensor(draft_ids))
    texts = [prompts(1, seed)[0][0][: 12 - 3 * seed] for seed in range(2)]
    rows = [with_text_targets(TrainExample(text, torch.zeros_like(text)), 3, ()) for text in texts]
    options = {"distillation": Distillation(3.0, 0.6), "gamma": 0.5, "chunk": 4}
    trainer = trainer_of(verifier, tmp_path, drafter=drafter, examples=rows, trainer=options)
    loss = trainer.compute_loss(drafter, trainer.data_collator(rows))

    ce, kl = [[] for _ in range(3)], [[] for _ in range(3)]
    for text, row in zip(texts, rows, strict=True):
        teacher = model(text[None]).logits[0][:, draft_ids]
        hiddens = verifier.hiddens(text[None])[0]
        for p, targets in zip(row.positions.tolist(), row.targets.tolist(), strict=True):
            read = torch.tensor([text[p], *targets[:-1]]).clamp(min=0)
            student = drafter(hiddens[p - 1][None], verifier.embed(read)[None])[0]
            for k in range(3):
                if targets[k] == IGNORED:
                    continue
                q, t = (student[k] / 3).log_softmax(-1), (teacher[p + k] / 3).log_softmax(-1)
                kl[k].append(9 * (t.exp() * (t - q)).sum())
                if targets[k] in draft_ids:
                    ce[k].append(-student[k].log_softmax(-1)[draft_ids.index(targets[k])])
    means = [0.4 * sum(ce[k]) / len(ce[k]) + 0.6 * sum(kl[k]) / len(kl[k]) for k in range(3)]
    expected = sum(0.5**k * means[k] for k in range(3)) / 1.75
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in drafter.parameters())


def test_accumulated_batches_are_one_batch(tmp_path):
    """Means are over all targets of a step, however it is cut: texts of 24, 12, 6 and 3 tokens."""
    verifier = Verifier(tiny_model("gpt2"))
    weights = []
    for batch in (4, 1):
        text = prompts(1)[0][0].repeat(2)
        examples = [
            with_text_targets(TrainExample(text[:n], torch.zeros(n, dtype=torch.int64)), 4, ()) for n in (24, 12, 6, 3)
        ]
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 3}
        options["optim"] = "sgd"  # Adam would hide a wrong scale
        drafter = random_drafter()
        trainer = trainer_of(verifier, tmp_path / str(batch), drafter=drafter, examples=examples, **options)
        trainer.train()
        weights.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append([parameter.detach() for parameter in drafter.parameters()])
    torch.testing.assert_close(weights[0], weights[2])
    torch.testing.assert_close(weights[1], weights[3])


def test_targets_that_the_draft_vocabulary_lacks_are_counted(tmp_path):
    verifier = Verifier(tiny_model("gpt2"))
    text = torch.tensor([5, 1, 2, 1, 3])
    row = with_text_targets(TrainExample(text, torch.zeros_like(text)), 1, ())  # targets 2, 1, 3
    drafter = random_drafter(draft_vocab_size=2)
    drafter.draft_ids.copy_(torch.tensor([1, 2]))
    trainer = trainer_of(verifier, tmp_path, drafter=drafter, examples=[row], max_steps=1)
    trainer.train()
    (share,) = [e["targets_outside_draft_vocab"] for e in trainer.state.log_history if "loss" in e]
    assert share == pytest.approx(1 / 3)


def test_overfitting_one_reply_accepts_everything(tmp_path):
    """The gate: what is learnt by heart has no loss, and is drafted whole."""
    verifier = Verifier(tiny_model("llama"))
    replies = replies_of(verifier, 1, new=41)  # the first token is prefill's, the other forty are eight steps of K + 1
    held_out = HeldOutReplies(verifier, replies)
    examples = [with_text_targets(replies[0].as_example(), 4, ())]
    options = {"max_steps": 150, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "save_strategy": "no"}
    trainer = trainer_of(verifier, tmp_path, examples=examples, held_out=held_out, **options)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1] < 0.02
    metrics = trainer.evaluate()
    assert metrics["eval_tokens_per_step"] == SHAPE.beam_length + 1
    assert all(metrics[f"eval_acceptance_pos{k}"] == 1 for k in range(1, 5))
    assert all(metrics[f"eval_topk_accuracy_{k}_depth{d}"] == 1 for k in range(1, 6) for d in range(1, 5))


def test_top_k_accuracy_and_loss_against_a_plain_loop():
    verifier = Verifier(tiny_model("gpt2"))
    replies = replies_of(verifier, 3, new=9)
    drafter = random_drafter(draft_vocab_size=60)
    measured = HeldOutReplies(verifier, replies).measure(drafter, DraftShape(2, 3), top_k=4)
    ranks, losses = [[] for _ in range(3)], [[] for _ in range(3)]
    with torch.inference_mode():
        for reply in replies:
            row = with_text_targets(reply.as_example(), 3, ())
            hiddens = verifier.hiddens(row.input_ids[None])[0]
            for p, targets in zip(row.positions.tolist(), row.targets.tolist(), strict=True):
                read = torch.tensor([row.input_ids[p], *targets[:-1]]).clamp(min=0)
                logits = drafter(hiddens[p - 1][None], verifier.embed(read)[None])[0]
                for d, target in enumerate(targets):
                    if target == IGNORED:
                        continue
                    order = logits[d].argsort(descending=True).tolist()
                    ranks[d].append(order.index(target) if target < 60 else 99)
                    if target < 60:
                        losses[d].append(functional.cross_entropy(logits[d], torch.tensor(target)).item())
    for d in range(3):
        for k in range(1, 5):
            expected = sum(rank < k for rank in ranks[d]) / len(ranks[d])
            assert measured[f"topk_accuracy_{k}_depth{d + 1}"] == pytest.approx(expected)
    assert measured["loss"] == pytest.approx(sum(sum(part) / len(part) for part in losses) / 3, rel=1e-4)


def test_the_best_checkpoint_is_loaded_and_training_stops_early(tmp_path):
    verifier = Verifier(tiny_model("llama"))
    held_out = HeldOutReplies(verifier, replies_of(verifier, 4))
    trainer = trainer_of(
        verifier,
        tmp_path,
        held_out=held_out,
        max_steps=200,
        learning_rate=0.1,  # wild, so that it gets worse
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_tokens_per_step",
        greater_is_better=True,
        trainer={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_tokens_per_step" in entry]
    values = [entry["eval_tokens_per_step"] for entry in history]
    best = max(range(len(values)), key=values.__getitem__)  # the first of them
    assert trainer.state.global_step < 200 and len(values) == best + 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{4 * (best + 1)}")
    assert trainer.evaluate()["eval_tokens_per_step"] == values[best]
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"checkpoint-{4 * (best + 1)}", f"checkpoint-{4 * len(values)}"}
    state = json.loads((tmp_path / f"checkpoint-{4 * len(values)}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint


def test_the_verifier_is_neither_trained_nor_saved(tmp_path):
    model = tiny_model("gpt2")
    verifier = Verifier(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drafter = random_drafter()
    trainer = trainer_of(verifier, tmp_path, drafter=drafter, max_steps=2)
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    learnt = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert learnt == {id(p) for p in drafter.parameters()}
    assert load_file(tmp_path / "checkpoint-2/model.safetensors").keys() == drafter.state_dict().keys()


class Poison(TrainerCallback):
    """Makes the weights useless before a step."""

    def __init__(self, drafter, step, parameter="rnn_u"):
        self.weight, self.step = getattr(drafter, parameter).weight, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.weight.data.fill_(math.nan)


def test_a_loss_that_is_no_number_stops_training(tmp_path):
    verifier = Verifier(tiny_model("gpt2"))
    drafter = random_drafter()
    options = {"trainer": {"callbacks": [Poison(drafter, 5)]}}
    with pytest.raises(
        ValueError, match=r"loss is nan at step 6, on training examples \d, \d: .*checkpoint-4"
    ) as raised:
        trainer_of(verifier, tmp_path, drafter=drafter, **options).train()
    assert "\n" not in str(raised.value)
    kept = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    verifier = Verifier(tiny_model("gpt2"))
    drafter = random_drafter()

    class Late(Poison):
        def on_step_end(self, args, state, control, **_):
            self.on_step_begin(args, state, control)

    with pytest.raises(ValueError, match=r"weights are not numbers after step 4.*checkpoint-2"):
        trainer_of(verifier, tmp_path, drafter=drafter, trainer={"callbacks": [Late(drafter, 4)]}).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    verifier = Verifier(tiny_model("gpt2"))
    trainer = trainer_of(verifier, tmp_path)
    save = torch.save

    def full(what, path):
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(what, path)

    monkeypatch.setattr(torch, "save", full)  # the optimizer's state, written after the weights
    with (
        pytest.raises(OSError, match=r"could not be written .*No space left.*checkpoint-2 is whole"),
        saying_what_was_not_written(tmp_path),
    ):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]  # and what was half written is gone
    monkeypatch.undo()
    trainer_of(verifier, tmp_path).train(str(last_checkpoint(tmp_path)))
    assert last_checkpoint(tmp_path).name == "checkpoint-8"


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    verifier = Verifier(tiny_model("gpt2"))
    examples = [with_text_targets(reply.as_example(), 4, ()) for reply in replies_of(verifier, 4)]
    own, other = (run_fingerprint(verifier_fingerprint(verifier), examples, {"method": m}) for m in "ab")
    assert own != run_fingerprint(verifier_fingerprint(verifier), examples[1:], {"method": "a"})
    assert verifier_fingerprint(verifier) != verifier_fingerprint(Verifier(tiny_model("llama")))
    trainer_of(verifier, tmp_path, examples=examples, max_steps=2, trainer={"fingerprint": own}).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer_of(verifier, tmp_path, examples=examples, max_steps=4, trainer={"fingerprint": own}).train(checkpoint)
    with pytest.raises(ValueError, match="another run"):
        trainer_of(verifier, tmp_path, examples=examples, trainer={"fingerprint": other}).train(checkpoint)
