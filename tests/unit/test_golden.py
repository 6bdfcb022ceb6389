"""What version 0.1.0 saved goes on loading: a drafter, its run.json, a published repository."""

import importlib
import json
import re
from pathlib import Path

import torch

from recurrent_drafter import RecurrentDraftingSpeculator
from recurrent_drafter.models.loading import load_drafter
from recurrent_drafter.report.card import CardFacts, model_card

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = '''"""Decodes with the recurrent drafter of this repository; README.md says how to call it."""

from recurrent_drafter.hub import generate_with_drafter


def generate(model, **arguments):
    """As `model.generate`: the same tokens in fewer steps."""
    return generate_with_drafter(model, "user/drafter", __file__, **arguments)
'''


def test_a_drafter_computes_what_it_computed():
    expected = json.loads((GOLDEN / "drafter.expected.json").read_text())
    drafter = load_drafter(GOLDEN / "drafter", dtype=torch.float32)
    hidden, embedded = torch.linspace(-1, 1, 32)[None], torch.linspace(1, -1, 64).view(1, 2, 32)
    with torch.no_grad():
        logits = drafter.unroll(hidden, embedded)
    assert drafter.draft_ids.tolist() == expected["draft_ids"]
    assert torch.allclose(logits[0, 1, :8], torch.tensor(expected["logits"]), atol=2e-5)
    shape = drafter.config.draft_shape
    assert (shape.beam_width, shape.beam_length, shape.nodes) == (3, 4, 12)


def test_a_drafter_is_saved_as_it_was(tmp_path):
    RecurrentDraftingSpeculator.from_pretrained(GOLDEN / "drafter").save_pretrained(tmp_path)
    saved, golden = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / "drafter"))
    golden.pop("use_cache")  # which Trainer sets, and loading drops
    assert saved == golden
    assert (tmp_path / "model.safetensors").read_bytes() == (GOLDEN / "drafter/model.safetensors").read_bytes()


def test_its_run_record_makes_its_card():
    drafter = load_drafter(GOLDEN / "drafter")
    run = json.loads((GOLDEN / "drafter/run.json").read_text())
    card = model_card("user/drafter", CardFacts(drafter.config, drafter.num_parameters(), "./verifier", run=run))
    assert "python train_speculator.py --llm_name_or_path ./verifier --dataset_name demo --max_steps 3" in card
    assert f"{run['metrics']['eval_tokens_per_step']:.2f}" in card and run["method"].replace("_", " ") in card


def test_what_published_repositories_import_is_there():
    (module, name) = re.search(r"from (\S+) import (\S+)", PUBLISHED).groups()
    assert callable(getattr(importlib.import_module(module), name))
