"""Tiny random models of several architectures: the output must be the verifier's, whatever the drafter says."""

import copy
import json

import pytest
import torch
from models import VOCABULARY, WIDTH, generate, prompts, random_drafter, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TrainingArguments,
)

from recurrent_drafter import DraftShape, RecurrentDrafter, RecurrentDraftingConfig, RecurrentDraftingSpeculator
from recurrent_drafter.core.accept import follow_tree
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import prefix_tree
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.decoding.decode import BeamDrafter, Drafting, FixedController, decode, hidden_after
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.measure.divergence import first_divergence
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.distillation import distilled_targets, with_distilled_targets
from recurrent_drafter.training.examples import with_text_targets
from recurrent_drafter.training.trainer import DrafterTrainer

NAMES = ["gpt2", "llama", "qwen2"]


def beams_from_text(texts: torch.Tensor, at, shift: int):
    """A stand-in for beam search: its beams are the texts (B, S) from the places (row, column) ``at()``, shifted."""

    def draft(drafter, hidden, root, width, length, deeper):
        rows, places = torch.tensor(at()).T
        ahead = (places[:, None] + torch.arange(length)).clamp(max=texts.shape[1] - 1)
        known = (texts[rows].gather(1, ahead) + shift) % VOCABULARY
        tokens = torch.stack([(known + beam) % VOCABULARY for beam in range(width)], 2)  # beam 0 is the text itself
        scores = -torch.arange(1.0, 1 + length * width).view(1, length, width).expand(len(rows), -1, -1)
        return Beams(tokens, torch.zeros_like(tokens), scores)

    return draft


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_output_is_the_models_own(name, attention):
    model = tiny_model(name, attention)
    for batch in (5, 1):
        ids, mask = prompts(batch)
        expected = generate(model, ids, mask)
        if batch == 5:
            assert len(expected[:, 12:].unique()) >= 20, "outputs must vary"
        for shape in (DraftShape(3, 4), DraftShape(4, 5, 8), DraftShape(1, 1)):
            speculator = RecurrentDraftingSpeculator(random_drafter(), shape)
            assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)
        alone = RecurrentDraftingSpeculator(lookup=False)
        assert torch.equal(generate(model, ids, mask, custom_generate=alone), expected)
        assert alone.stats.tokens_per_step == 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(("shift", "accepts"), [(0, True), (50, False)])
def test_oracle_and_adversary(name, shift, accepts, monkeypatch):
    """Whole paths accepted, or never one: the output stays; the steps tell which it was. Ragged batch of 3."""
    model = tiny_model(name)
    ids, mask = prompts(3)
    expected = generate(model, ids, mask)
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(2, 4))
    stops = []
    real_emit = GenerationState.emit
    monkeypatch.setattr(GenerationState, "emit", lambda stop, step: stops.append(stop) or real_emit(stop, step))
    at = lambda: [(row, 12 + len(stops[-1].generated[row])) for row in stops[-1].rows]  # noqa: E731
    monkeypatch.setattr(BeamDrafter, "__call__", beams_from_text(expected, at, shift))
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)
    if accepts:
        assert speculator.stats.tokens_per_step > 4
    else:
        assert speculator.stats.tokens_per_step == 1


@pytest.mark.parametrize("name", NAMES)
def test_tree_logits_are_linear_logits_and_kept_text_is_from_scratch(name):
    """Three verifications in a row, after each of which every row keeps another number of nodes."""
    model = tiny_model(name)
    verifier = Verifier(model)
    draft = BeamDrafter(random_drafter(), verifier.embed)
    ids, mask = prompts(3)
    texts = [ids[row][mask[row].bool()] for row in range(3)]
    with torch.inference_mode():
        session, read = verifier.open(ids, mask, 16)  # the cache has to grow
        root, hidden = read.logits[:, -1].argmax(-1), read.hiddens[:, -1]
        for turn in range(3):
            beams = draft(hidden, root, 3, 3)
            tree = prefix_tree(root, beams, 8)
            verified = session.forward_tree(tree)
            for row in range(3):
                for node in range(8):
                    path = tree.tokens[row][tree.ancestors[row, node]]
                    linear = model(torch.cat([texts[row], path])[None]).logits[0, -1]
                    torch.testing.assert_close(verified.logits[row, node], linear, rtol=1e-4, atol=1e-3)
            wanted = [(row + turn) % 3 for row in range(3)]
            accepted = follow_tree(tree, lambda node, tree=tree, wanted=wanted: child_up_to(tree, node, wanted))
            assert accepted.n_accepted.tolist() == wanted
            for row in range(3):
                texts[row] = torch.cat([texts[row], tree.tokens[row][accepted.path[row, : wanted[row] + 1]]])
            session.keep(accepted.path, wanted)
            root, hidden = accepted.bonus_token, hidden_after(accepted, verified.hiddens)


def child_up_to(tree, node, depths):
    """Per row the token of a child that leads to the row's depth; a token that no child carries once it is reached."""
    tokens = []
    for row, depth in enumerate(depths):
        deep = [n for n in range(8) if tree.depths[row, n] == depth and tree.ancestors[row, n, node[row]]]
        on_path = tree.ancestors[row, deep[0]].nonzero()[:, 0].tolist() if deep else []
        below = [n for n in on_path if tree.parents[row, n] == node[row] and n != 0]
        children = {int(tree.tokens[row, n]) for n in range(1, 8) if tree.parents[row, n] == node[row]}
        unused = next(token for token in range(VOCABULARY) if token not in children)
        tokens.append(int(tree.tokens[row, below[0]]) if below else unused)
    return torch.tensor(tokens)


def test_end_token_inside_an_accepted_path():
    model = tiny_model("gpt2")
    ids, mask = prompts(1)
    free = generate(model, ids, mask)
    end = int(free[0, 12 + 9])
    expected = generate(model, ids, mask, eos_token_id=end)
    assert expected.shape[1] < free.shape[1]
    for seed in range(3):
        speculator = RecurrentDraftingSpeculator(random_drafter(seed), DraftShape(4, 4))
        assert torch.equal(generate(model, ids, mask, eos_token_id=end, custom_generate=speculator), expected)


def test_a_custom_stopping_criterion_is_asked_token_by_token():
    class AfterSeven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 12 + 7])

    model = tiny_model("gpt2")
    ids, mask = prompts(1)
    criteria = StoppingCriteriaList([AfterSeven()])
    expected = generate(model, ids, mask, stopping_criteria=criteria)
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(4, 4))
    assert torch.equal(generate(model, ids, mask, stopping_criteria=criteria, custom_generate=speculator), expected)


def test_reply_up_to_the_last_position_of_the_context():
    model = tiny_model("gpt2")
    ids, mask = prompts(1)
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(3, 6))
    expected = generate(model, ids, mask, new=256 - 12)
    assert torch.equal(generate(model, ids, mask, new=256 - 12, custom_generate=speculator), expected)
    with pytest.raises(ValueError, match="exceed the context of 256"):
        generate(model, ids, mask, new=256 - 11, custom_generate=speculator)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_distilled_targets_are_what_generate_gives_position_by_position(name):
    model = tiny_model(name)
    text = prompts(1, seed=3)[0][0].repeat(2)
    roots = torch.ones(24, dtype=torch.bool)
    roots[[0, 5]] = False
    free = distilled_targets(Verifier(model), text, roots, 4, (), chunk=7)
    end = int(free[3, 1])
    cut = distilled_targets(Verifier(model), text, roots, 4, (end,), chunk=100)
    for eos, targets in ((None, free), (end, cut)):
        for row, position in enumerate(roots.nonzero()[:, 0].tolist()):
            prefix = text[None, : position + 1]
            own = generate(model, prefix, torch.ones_like(prefix), new=4, eos_token_id=eos)[0, position + 1 :]
            assert [token for token in targets[row].tolist() if token != -100] == own.tolist()
    assert (cut == -100).any()


def test_training_rows_are_the_loops_own():
    """The (hidden, root) pairs that decoding drafts from stand in the finished text as training takes them."""
    model = tiny_model("llama")
    verifier = Verifier(model)
    ids, _ = prompts(1)
    stop = GenerationState(ids, 30)
    seen = []

    draft = BeamDrafter(random_drafter(), verifier.embed)

    def record(hidden, root, *shape):
        seen.append((12 + len(stop.generated[0]) - 1, hidden, root))
        return draft(hidden, root, *shape)

    with torch.inference_mode():
        for _ in decode(verifier, Drafting(FixedController(DraftShape(3, 3)), record), stop, Sampler(stop)):
            pass
        text = torch.cat([ids[0], torch.tensor(stop.generated[0])])
        spans = torch.full_like(text, -1)
        spans[12:] = 0
        rows = with_text_targets(TrainExample(text, spans), 3, ())
        hiddens = verifier.hiddens(text[None])[0][rows.positions - 1]
        assert torch.equal(model.get_output_embeddings()(hiddens).argmax(-1), text[rows.positions])
        assert len(seen) > 20
        for position, hidden, root in seen:
            row = rows.positions.tolist().index(position)
            assert root.item() == text[position]
            torch.testing.assert_close(hidden[0], hiddens[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [DraftShape(1, 3), DraftShape(4, 4, 9)])
def test_acceptance_walk_is_greedy_decodings_own_figure(shape, tmp_path):
    """A drafter trained a little, so that acceptance varies: walking its held-out replies gives decoding's figure."""
    model = tiny_model("llama")
    verifier = Verifier(model)
    asked = [prompts(1, seed)[0][0] for seed in range(6)]
    replies = greedy_replies(verifier, asked, 40, ())
    drafter, losses = overfit(verifier, [reply.as_example() for reply in replies], tmp_path, steps=60)
    assert losses[-1] < 0.7 * losses[0]
    held_out = HeldOutReplies(verifier, replies)
    walked = held_out.tokens_per_step(drafter, shape)
    steps = tokens = 0
    for reply in replies:
        speculator = RecurrentDraftingSpeculator(drafter, shape)
        # One token more than the reply is not known to the walk, so decode exactly the reply.
        output = generate(model, reply.prompt[None], torch.ones_like(reply.prompt[None]), custom_generate=speculator)
        assert torch.equal(output[0, 12:], reply.tokens)
        steps, tokens = steps + speculator.stats.steps, tokens + speculator.stats.tokens
    assert tokens / steps > 1.15, "something must be accepted"
    assert walked == pytest.approx(tokens / steps, abs=1e-12)


def overfit(verifier, examples, path, steps):
    drafter = random_drafter(beam_width=2)
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [with_text_targets(example, 4, ()) for example in examples]
    trainer = DrafterTrainer(
        drafter, arguments, verifier=verifier, train_examples=rows, held_out=None, shape=DraftShape(2, 4)
    )
    trainer.train()
    return drafter.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_chunks_do_not_change_the_loss_or_its_gradient(tmp_path):
    model = tiny_model("gpt2")
    verifier = Verifier(model)
    ids = prompts(1)[0][0]
    (example,) = with_distilled_targets(verifier, [TrainExample(ids, torch.zeros_like(ids))], 3, ())
    results = []
    for chunk in (4, 1000):
        drafter = random_drafter()
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        trainer = DrafterTrainer(
            drafter,
            arguments,
            verifier=verifier,
            train_examples=[example],
            held_out=None,
            shape=DraftShape(),
            chunk=chunk,
        )
        loss = trainer.compute_loss(drafter, trainer.data_collator([example, example]))
        loss.backward()
        results.append((loss.detach(), drafter.rnn_u.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_distilled_targets_of_the_verifiers_own_text_are_the_text():
    model = tiny_model("gpt2")
    verifier = Verifier(model)
    (reply,) = greedy_replies(verifier, [prompts(1)[0][0]], 30, ())
    text = with_text_targets(reply.as_example(), 4, ())
    (distilled,) = with_distilled_targets(verifier, [reply.as_example()], 4, ())
    known = text.targets != -100
    assert known.sum() > 100
    assert torch.equal(text.targets[known], distilled.targets[known])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"token_type_ids": torch.zeros(1, 12, dtype=torch.int64)}, "token_type_ids"),
    ],
)
def test_unsupported_options_are_refused_by_name(options, message):
    ids, mask = prompts(1)
    with pytest.raises(ValueError, match=message):
        tiny_model("gpt2").generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=4,
            custom_generate=RecurrentDraftingSpeculator(random_drafter()),
            **options,
        )


def test_a_drafter_for_another_verifier_is_refused():
    other = RecurrentDrafter(RecurrentDraftingConfig(hidden_size=WIDTH, vocab_size=VOCABULARY + 1))
    with pytest.raises(ValueError, match="vocabulary 98"):
        RecurrentDraftingSpeculator(other).attach_verifier(tiny_model("gpt2"))


def test_a_divergence_is_a_tie_or_a_bug():
    model = tiny_model("gpt2")
    verifier = Verifier(model)
    ids, mask = prompts(1)
    expected = generate(model, ids, mask)[0, 12:].tolist()
    assert first_divergence(verifier, ids[0], expected, expected) is None
    wrong = [*expected[:5], (expected[5] + 1) % VOCABULARY, *expected[6:]]
    found = first_divergence(verifier, ids[0], expected, wrong)
    assert (found.position, found.is_tie) == (5, False)
    assert not first_divergence(verifier, ids[0], expected, expected[:-1]).is_tie


def test_streamed_tokens_are_the_output():
    model = tiny_model("llama")
    ids, mask = prompts(1)
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(3, 3))
    speculator.attach_verifier(model)
    streamed = [token for step in speculator.stream(ids, max_new_tokens=20, end_ids=()) for token in step]
    assert streamed == generate(model, ids, mask, new=20)[0, 12:].tolist()


def test_a_copy_of_a_used_speculator_decodes_on_its_own():
    model = tiny_model("llama")
    ids, mask = prompts(1)
    speculator = RecurrentDraftingSpeculator(random_drafter())
    expected = generate(model, ids, mask, custom_generate=speculator)
    twin = copy.deepcopy(speculator)
    assert twin.drafter is not speculator.drafter
    assert twin.tuning == speculator.tuning
    assert torch.equal(generate(model, ids, mask, custom_generate=twin), expected)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(4, dtype=torch.long), None, r"shape \(4,\): expected integers of shape"),
        (torch.zeros(1, 4), None, "float32 of shape"),
        (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3), r"attention_mask is of shape \(1, 3\)"),
    ],
)
def test_malformed_prompts_are_named(ids, mask, message):
    speculator = RecurrentDraftingSpeculator(random_drafter())
    speculator.attach_verifier(tiny_model("llama"))
    with pytest.raises(ValueError, match=message):
        speculator.generate(ids, mask, max_new_tokens=4)


class StopsRowByRow(StoppingCriteria):
    """As long as each row's own place in the batch says."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 12 + length for length in (5, 9, 13)])[: len(input_ids)]


class InPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 5] = -torch.inf
        return scores


def test_criteria_and_processors_that_ask_which_row_they_are_given():
    model = tiny_model("llama")
    ids, mask = prompts(3)
    speculator = RecurrentDraftingSpeculator(random_drafter(), DraftShape(2, 3))
    options = {"logits_processor": LogitsProcessorList([InPlace()]), "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    found = model.generate(ids, attention_mask=mask, pad_token_id=0, custom_generate=speculator, **options)
    assert torch.equal(found, expected)
    criteria = StoppingCriteriaList([StopsRowByRow()])
    stopped = model.generate(
        ids, attention_mask=mask, custom_generate=speculator, stopping_criteria=criteria, **options
    )
    for number, length in enumerate((5, 9, 13)):
        assert torch.equal(stopped[number, 12 : 12 + length], expected[number, 12 : 12 + length])
    assert speculator.stats.tokens == 5 + 9 + 13 - 3


@pytest.mark.parametrize("shape", [DraftShape(4, 5, 9), None])
def test_a_damaged_drafter_changes_no_token(shape):
    model = tiny_model("gpt2")
    ids, mask = prompts(2)
    drafter = random_drafter()
    with torch.no_grad():
        drafter.rnn_u.weight[0, 0] = torch.nan
    found = generate(model, ids, mask, custom_generate=RecurrentDraftingSpeculator(drafter, shape))
    assert torch.equal(found, generate(model, ids, mask))


def test_arguments_that_would_do_nothing_are_refused():
    speculator = RecurrentDraftingSpeculator(random_drafter())
    model = tiny_model("llama")
    speculator.attach_verifier(model)
    ids, _ = prompts(1)
    with pytest.raises(ValueError, match="assistant_model"):
        speculator.generate(ids, assistant_model=model, max_new_tokens=4)
    with pytest.raises(ValueError, match="2 sequences cannot be streamed"):
        list(speculator.stream(ids, num_return_sequences=2, do_sample=True, max_new_tokens=4))


def test_weights_that_do_not_belong_to_the_config_are_named(tmp_path):
    RecurrentDraftingSpeculator(random_drafter()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_draft_layers": config["num_draft_layers"] + 1}))
    with pytest.raises(ValueError, match="is damaged: its weights and its config.json do not belong together"):
        RecurrentDraftingSpeculator.from_pretrained(tmp_path)
