"""`tune`: the walk of all shapes at once, the prediction by hand, and a record that is used where it holds."""

import dataclasses
import json
import logging

import pytest
import torch
from models import generate, prompts, random_drafter, tiny_model
from test_decoding import overfit

import recurrent_drafter.cli.measuring as command
from recurrent_drafter import DraftShape, RecurrentDraftingSpeculator
from recurrent_drafter.cli.main import launch
from recurrent_drafter.decoding.costs import TUNING_FILE, Costs, Tuning, conditions
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.decoding.draft_controller import LONGEST
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.measure.step_costs import measure_costs
from recurrent_drafter.measure.tuning import (
    REJECTED,
    DraftRanks,
    best_of_each_cell,
    measure_acceptance,
    path_ranks,
    predict,
)
from recurrent_drafter.models.verifier import Verifier


def test_one_draft_gives_the_figures_of_every_shape(tmp_path):
    model = tiny_model("llama")
    verifier = Verifier(model)
    replies = greedy_replies(verifier, [prompts(1, seed)[0][0] for seed in range(5)], 30, ())
    drafter, _ = overfit(verifier, [reply.as_example() for reply in replies], tmp_path, steps=15)
    held_out = HeldOutReplies(verifier, replies)
    figures = set()
    for width in (1, 3):
        acceptance = measure_acceptance(held_out, drafter, width, 5)
        for length in (1, 3, 5):
            for nodes in (2, 4, 7, 1 + width * length):
                walks = acceptance.walks(length, nodes)
                found = sum(x.tokens for x in walks) / sum(x.steps for x in walks)
                shape = DraftShape(width, length, nodes)
                assert found == pytest.approx(held_out.tokens_per_step(drafter, shape), abs=1e-12), shape
                figures.add(round(found, 6))
    assert len(figures) > 6, "acceptance must vary with the shape"


def test_ranks_by_hand():
    """Two levels of two: nodes 1 and 2 (0.6, 0.3), then 3 and 4 (0.5, 0.1); the path 0, 1, 3 is accepted."""
    log_probs = torch.tensor([[1.0, 0.6, 0.3, 0.5, 0.1]]).log()
    ranks = path_ranks(log_probs, torch.tensor([[0, 1, 3]]), torch.tensor([2]), width=2)
    assert ranks[0].tolist() == [[1, REJECTED], [1, 2]]
    assert path_ranks(log_probs, torch.tensor([[0, 2, 2]]), torch.tensor([1]), width=2)[0, 1].tolist() == [3, REJECTED]


def test_prediction_by_hand():
    """Two replies of 7 tokens, one accepted in threes, one never; together, the first leaves the batch early."""
    ranks = torch.full((7, 2, 2), REJECTED)
    always = ranks.clone()
    always[:, 1] = torch.tensor([1, 2])
    acceptance = DraftRanks([always, ranks])
    drafting = {(1, 2): 0.5}
    single = Costs((1, 3), (1.0, 2.0), 0.0, drafting)
    double = Costs((2, 6), (2.0, 5.0), 0.0, drafting, batch=2)
    alone = predict({1: acceptance}, single, single, [2])  # a step takes 2.0 with 2 nodes, 2.5 with 3
    assert [x.shape for x in alone] == [DraftShape(1, 2, 2), DraftShape(1, 2, 3)]
    assert [x.tokens_per_step for x in alone] == [12 / (3 + 6), 12 / (2 + 6)]
    assert [x.speedup for x in alone] == pytest.approx([12 / (9 * 2.0), 12 / (8 * 2.5)])
    together = predict({1: acceptance}, single, double, [2])  # 4.0 and 5.5 with both rows, 2.0 for autoregression
    assert [x.speedup for x in together] == pytest.approx([12 / (3 * 4.0 + 3 * 2.0), 12 / (2 * 5.5 + 4 * 2.5)])
    assert [cell.shape for cell in best_of_each_cell(alone[::-1]).values()] == [DraftShape(1, 2, 2)]


def tuned_folder(path, model, **changed):
    RecurrentDraftingSpeculator(random_drafter(beam_width=2)).save_pretrained(path)
    tuning = Tuning(DraftShape(3, 2, 5), Costs((1, 2, 8), (1.0, 1.1, 1.2), 0.01), conditions(model) | changed)
    (path / TUNING_FILE).write_text(json.dumps(tuning.as_record()))
    return tuning


def test_a_tuning_that_holds_is_used(tmp_path):
    model = tiny_model("llama")
    tuning = tuned_folder(tmp_path, model)
    assert Tuning.from_folder(tmp_path) == tuning
    speculator = RecurrentDraftingSpeculator.from_pretrained(tmp_path, verifier=model)
    ids, mask = prompts(1)
    assert torch.equal(generate(model, ids, mask, custom_generate=speculator), generate(model, ids, mask))
    assert speculator.experience.costs.start == tuning.costs
    assert speculator.controller(temperature=0.0).shape == DraftShape(3, LONGEST)


def test_other_shapes_and_tunings_share_what_is_packed_and_change_no_token():
    model, tuning = tiny_model("llama"), Costs((1, 2, 8), (1.0, 1.1, 1.2), 0.01)
    speculator = RecurrentDraftingSpeculator(random_drafter(beam_width=2))
    speculator.attach_verifier(model)
    shaped, alone = speculator.with_shape(DraftShape(3, 2)), speculator.without_drafter()
    tuned = speculator.with_tuning(Tuning(DraftShape(3, 2, 5), tuning, conditions(model)))
    ids, mask = prompts(1)
    for other in (shaped, alone, tuned):
        assert other.packed is speculator.packed
        assert torch.equal(generate(model, ids, mask, custom_generate=other), generate(model, ids, mask))
    assert (shaped.shape, alone.drafter, tuned.experience.costs.start) == (DraftShape(3, 2), None, tuning)
    assert tuned.controller(temperature=0.0).shape == DraftShape(3, LONGEST)
    assert speculator.shape is None and speculator.drafter is not None
    assert speculator.experience.costs is not tuned.experience.costs


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"hardware": {"device": "abacus"}}, {"verifier": {}}])
def test_a_tuning_for_something_else_is_ignored(changed, tmp_path, caplog):
    model = tiny_model("llama")
    tuned_folder(tmp_path, model, **changed)
    with caplog.at_level(logging.INFO, "recurrent_drafter"):
        speculator = RecurrentDraftingSpeculator.from_pretrained(tmp_path, verifier=model)
    assert speculator.experience.costs.start != Costs((1, 2, 8), (1.0, 1.1, 1.2), 0.01)
    assert f"{TUNING_FILE} is not used: it is for the {next(iter(changed))}" in caplog.text


@pytest.mark.parametrize("content", ["{", "{}", '{"costs": []}', "[1]", ""])
def test_a_damaged_tuning_is_ignored(content, tmp_path, caplog):
    (tmp_path / TUNING_FILE).write_text(content)
    assert Tuning.from_folder(tmp_path) is None
    assert "cannot be read and is ignored" in caplog.text


FEW = ["--base_model", "demo", "--dtype", "float32", "--prompts", "3", "--new_tokens", "10"]
FEW += ["--widths", "1", "2", "--lengths", "2", "3", "--confirm", "1"]


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tuned"
    monkeypatch.setattr(command, "can_draw", lambda: False)
    assert launch("tune", [*FEW, "--batch_size", "1", "2", "--output_dir", str(folder), "--copy_drafter"]) == 0
    said = capsys.readouterr()
    (warning,) = [line for line in said.err.splitlines() if "left" not in line]  # a slow machine says how far it is
    assert "matplotlib is not installed" in warning
    assert "predicted" in said.out and " + lookup" in said.out
    assert not (folder / "tuning.png").exists()
    record = json.loads((folder / TUNING_FILE).read_text())
    assert [batch["batch_size"] for batch in record["batches"]] == [1, 2]
    for batch in record["batches"]:
        pairs = zip(batch["predicted"], batch["predicted_with_lookup"], strict=False)
        assert all(alone["shape"] == joined["shape"] for alone, joined in pairs) and batch["predicted_with_lookup"]
        assert sum(arm.endswith("+ lookup") for arm in batch["decoded"]) == 1
    model, _ = command.load_verifier("demo", dtype="float32")
    speculator = RecurrentDraftingSpeculator.from_pretrained(folder, verifier=model)
    assert speculator.experience.costs.start.verify == tuple(record["costs"]["verify"])
    assert not [file for file in folder.iterdir() if file.name.endswith(".tmp") or file.name.startswith(".")]
    assert launch("tune", [*FEW, "--output_dir", str(folder), "--copy_drafter"]) == 2  # a model is there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --output_dir"),
        (["--beam_width", "3"], "--widths"),
        (["--speculator_path", "some/hub-name"], "not a local folder"),
        (["--copy_drafter"], "--copy_drafter needs --output_dir"),
        (["--widths", "0"], "--widths has 0"),
        (["--output_dir", "{tmp}/file"], "file"),
    ],
)
def test_what_cannot_work_is_said_before_the_run(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "load_verifier", lambda *_, **__: pytest.fail("the run has begun"))
    assert launch("tune", [argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_speed_maps(tmp_path):
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    grid = {(width, length): width / length for width in (1, 2, 4) for length in (2, 3)}
    command.draw_speed_maps(tmp_path / "map.png", {"batch 1": grid, "batch 4": grid}, "a machine")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_costs_of_a_batch_count_all_its_rows():
    model = tiny_model("gpt2")
    verifier = Verifier(model)
    with torch.inference_mode():
        costs = measure_costs(
            verifier, BeamDrafter(random_drafter(), verifier.embed), 20, batch=3, rows=(1, 2, 4), widths=(2,), repeats=1
        )
    assert costs.rows == (3, 6, 12)
    assert costs.verifying(6) == costs.verify[1]
    assert dataclasses.asdict(costs)["rows"] == costs.rows
