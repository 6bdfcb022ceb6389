"""config.json in the speculators format: made from the fields when it is written, and never read back."""

import json

import pytest

from recurrent_drafter import RecurrentDrafter, RecurrentDraftingConfig
from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path

FORMAT = {"speculators_model_type", "speculators_version", "speculators_config", "transformer_layer_config"}
SHAPE = {"hidden_size": 8, "vocab_size": 12}
NAMED = {"verifier_name_or_path": "user/model", "verifier_architectures": ["GPT2LMHeadModel"]}


def written(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_what_is_written(tmp_path):
    saved = written(RecurrentDraftingConfig(**SHAPE, **NAMED, beam_length=3), tmp_path)
    assert saved["speculators_model_type"] == saved["model_type"] == "recurrent_drafter"
    assert saved["transformer_layer_config"].items() >= SHAPE.items()
    assert saved["speculators_config"] == {
        "algorithm": "recurrent_drafter",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        ],
        "verifier": {"name_or_path": "user/model", "architectures": ["GPT2LMHeadModel"]},
    }


def test_a_drafter_without_a_verifier_has_none_of_it(tmp_path):
    assert not FORMAT & written(RecurrentDraftingConfig(**SHAPE), tmp_path).keys()


@pytest.mark.parametrize("says", [{"algorithm": "eagle3"}, None, "nonsense", {"from": "a later version"}])
def test_what_a_file_says_there_is_dropped(says, tmp_path):
    config = RecurrentDraftingConfig(**SHAPE, **NAMED)
    good = written(config, tmp_path)
    other = {**good, "beam_length": 2, "speculators_later": says, **{name: says for name in FORMAT}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    again = RecurrentDraftingConfig.from_pretrained(tmp_path)
    assert not any(hasattr(again, name) for name in {*FORMAT, "speculators_later"})
    saved = written(again, tmp_path)
    assert "speculators_later" not in saved
    assert saved["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2
    assert saved["speculators_config"]["verifier"] == good["speculators_config"]["verifier"]


def test_a_changed_shape_is_the_one_that_is_written(tmp_path):
    config = RecurrentDraftingConfig(**SHAPE, **NAMED)
    config.update({"beam_length": 7})
    assert written(config, tmp_path)["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 7


def test_an_older_checkpoint_gains_it_when_saved(tmp_path):
    drafter = RecurrentDrafter(RecurrentDraftingConfig(**SHAPE, **NAMED))
    drafter.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in saved.items() if name not in {*FORMAT, "verifier_architectures"}}
    (tmp_path / "config.json").write_text(json.dumps(older))
    RecurrentDrafter.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    verifier = json.loads((tmp_path / "new/config.json").read_text())["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "user/model", "architectures": []}


def test_the_bundled_drafter_has_it(tmp_path):
    bundled = json.loads((demo_drafter_path() / "config.json").read_text())
    assert bundled == written(RecurrentDraftingConfig.from_pretrained(demo_drafter_path()), tmp_path)
    verifier = json.loads((demo_verifier_path() / "config.json").read_text())
    assert bundled["speculators_config"]["verifier"] == {
        "name_or_path": "demo",
        "architectures": verifier["architectures"],
    }
