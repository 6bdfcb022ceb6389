"""Our checkpoints in the ``speculators`` package itself, and what vLLM reads of them."""

import json
import subprocess
import sys

import pytest
import torch
from models import random_drafter

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.models.loading import load_drafter

pytestmark = pytest.mark.vllm

VERIFIER = {"verifier_name_or_path": "user/model", "verifier_architectures": ["GPT2LMHeadModel"]}
DRAFTERS = {
    "plain": {},
    "small": {"draft_vocab_size": 40, "emb_norm": True, "beam_length": 3, "max_tree_nodes": 5},
    "wide": {"exit_dim": 128, "rnn": False, "num_draft_layers": 0},
}


@pytest.fixture(scope="module")
def speculators():

    return sys.modules["speculators"]


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DRAFTERS)
def test_opened_and_saved_by_speculators(name, dtype, speculators, tmp_path):
    drafter = random_drafter(**DRAFTERS[name], **VERIFIER)
    drafter.draft_ids.copy_(drafter.draft_ids.flip(0))
    drafter.to(dtype).save_pretrained(tmp_path / "ours")
    opened = speculators.SpeculatorModel.from_pretrained(str(tmp_path / "ours"))
    from recurrent_drafter.formats.speculators import RecurrentDrafterSpeculator

    assert isinstance(opened, RecurrentDrafterSpeculator)
    assert same(opened.state_dict(), drafter.state_dict())
    hidden, embedded = torch.randn(3, 64).to(dtype), torch.randn(3, 4, 64).to(dtype)
    assert torch.equal(opened(hidden, embedded), drafter(hidden, embedded))
    opened.save_pretrained(tmp_path / "theirs")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    again = load_drafter(tmp_path / "theirs")
    assert same(again.state_dict(), drafter.state_dict())
    assert again.config.draft_shape == drafter.config.draft_shape


def test_what_speculators_knows_of_it(speculators):
    config = speculators.SpeculatorModelConfig.from_pretrained(str(demo_drafter_path()))
    told = config.speculators_config
    assert (told.algorithm, told.verifier.name_or_path) == ("recurrent_drafter", "demo")
    assert told.verifier.architectures == ["GPT2LMHeadModel"]
    assert told.proposal_methods[0].speculative_tokens == 6
    assert config.hidden_size == 384


def test_a_wrong_value_is_refused_by_our_config(speculators, tmp_path):
    random_drafter(**VERIFIER).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "draft_vocab_size": 98}))
    with pytest.raises(ValueError, match="draft_vocab_size is 98, expected 1 to 97"):
        speculators.SpeculatorModel.from_pretrained(str(tmp_path))


def test_other_speculators_still_open(speculators):
    methods = json.loads((demo_drafter_path() / "config.json").read_text())["speculators_config"]
    told = {"speculators_model_type": "eagle3", "speculators_config": {**methods, "algorithm": "eagle3"}}
    assert isinstance(speculators.SpeculatorModelConfig.from_dict(told), speculators.Eagle3SpeculatorConfig)


def test_what_vllm_reads():
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    config = json.loads((demo_drafter_path() / "config.json").read_text())
    assert SpeculatorsConfig.extract_vllm_speculative_config(config) == {
        "method": "recurrent_drafter",
        "num_speculative_tokens": 6,
    }


IMPORT = """
import importlib.metadata as metadata, sys
real = metadata.version
{}
import recurrent_drafter.formats.speculators
"""


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("sys.modules['speculators'] = None", "needs speculators 0.9.0, which cannot be imported"),
        (
            "metadata.version = lambda name: '0.8.1' if name == 'speculators' else real(name)",
            "needs speculators 0.9.0, and 0.8.1 is installed",
        ),
    ],
)
def test_without_the_package_it_is_said(first, message):
    ended = subprocess.run([sys.executable, "-c", IMPORT.format(first)], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("ImportError: recurrent_drafter.formats.speculators " + message)
