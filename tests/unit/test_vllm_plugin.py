"""Serving without vLLM: options, and drafts drawn from the drafter's law."""

from types import SimpleNamespace

import pytest
import torch

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path
from recurrent_drafter.core.beam import sampled_chain
from recurrent_drafter.vllm import compatibility, plugin
from recurrent_drafter.vllm.options import ServingOptions
from recurrent_drafter.vllm.proposer import DraftLaws, room_before_end


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": "4"}, "beam_width is '4'"),
        ({"drafts": "tree"}, "drafts is 'tree'"),
        ({"shed": 1}, "shed is 1"),
        ({"width": 4}, "has 'width' in it"),
        (7, "is 7"),
    ],
)
def test_options_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        ServingOptions.parse({"recurrent_drafter": given})


def test_a_chain_is_drawn_from_the_law_that_is_told():
    """Two tokens of a drafter that has a table for its law."""
    table = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])
    rows = 4000

    def step(token, state):
        at = torch.zeros(rows, 1, dtype=torch.int64) if token is None else token
        return table[at].log(), torch.zeros(rows, 1, 1)

    torch.manual_seed(0)
    temperature = torch.full((rows,), 0.8)
    temperature[0] = 0  # likeliest
    tokens, laws = sampled_chain(step, torch.tensor([7, 8, 9]), 2, temperature, lambda law: law.multinomial(1)[:, 0])
    warmed = (table.log() / 0.8).softmax(-1)
    assert tokens[0].tolist() == [7, 7]
    assert laws[0].tolist() == [[1, 0, 0], [1, 0, 0]]
    torch.testing.assert_close(laws[1:, 0], warmed[:1].expand(rows - 1, -1))
    torch.testing.assert_close(laws[1:, 1], warmed[tokens[1:, 0] - 7])
    share = torch.stack([(tokens[1:, 1][tokens[1:, 0] == 7] == token).float().mean() for token in (7, 8, 9)])
    torch.testing.assert_close(share, warmed[0], atol=0.04, rtol=0)


@pytest.mark.parametrize(("min_tokens", "written", "room"), [(0, 3, 4), (6, 6, 4), (6, 5, 0), (6, 4, 1), (60, 5, 4)])
def test_drafts_end_where_a_reply_may(min_tokens, written, room):
    """The bonus token after a whole draft is the last one that may not end the reply."""
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(min_tokens=min_tokens), output_token_ids=list(range(written))
    )
    assert room_before_end(request, 4) == room


def test_laws_of_drafts_that_are_not_known_reject_them():
    laws = DraftLaws(vocab_size=5)
    runner = SimpleNamespace(
        requests={"a": 0, "b": 0}, input_batch=SimpleNamespace(req_ids=["a", "b"]), _draft_token_ids=[[4], [1]]
    )
    laws.newest = runner._draft_token_ids
    laws.remember(["b"], torch.tensor([[[0.25, 0.75]]]))
    ids = torch.tensor([1, 3])
    assert laws.of(runner, [1, 1], ids).tolist() == [[0, 0, 0, 0, 0], [0, 0.25, 0, 0.75, 0]]
    runner._draft_token_ids = [[0], [0]]  # vLLM's own, at the end of a context
    assert not laws.of(runner, [1, 1], ids).any()


class Arguments(SimpleNamespace):
    """As much of vLLM's EngineArgs as the plugin reads."""

    def __init__(self, **changes) -> None:
        plain = {"speculative_config": None, "additional_config": {}, "skip_tokenizer_init": False}
        super().__init__(**{**plain, "spec_method": None, "spec_model": None, "spec_tokens": None, **changes})


def speculative_config(width=384, vocabulary=4096, pipeline=1, tensor=1, **changes):
    model = SimpleNamespace(
        get_hidden_size=lambda: width, get_vocab_size=lambda: vocabulary, tokenizer=str(demo_verifier_path())
    )
    parallel = SimpleNamespace(pipeline_parallel_size=pipeline, tensor_parallel_size=tensor)
    arguments = Arguments(**changes)
    plugin.create_speculative_config(lambda *_: None, arguments, model, parallel)
    return arguments


@pytest.fixture
def fits(monkeypatch):
    monkeypatch.setattr(compatibility, "check", lambda *_: None)


def test_a_drafter_becomes_our_proposer(fits):
    asked = {"model": str(demo_drafter_path()), "num-speculative-tokens": 3}
    arguments = speculative_config(speculative_config=asked, additional_config={"recurrent_drafter": {"beam_width": 4}})
    assert arguments.speculative_config == {
        "method": "custom_class",
        "model": plugin.PROPOSER,
        "num_speculative_tokens": 3,
    }
    options = ServingOptions.parse(arguments.additional_config)
    assert (options.speculator, options.beam_width, options.drafts) == (str(demo_drafter_path()), 4, "sampled")
    several = speculative_config(speculative_config={"model": str(demo_drafter_path())}, tensor=2)
    assert ServingOptions.parse(several.additional_config).drafts == "beam"
    by_flags = speculative_config(spec_model=str(demo_drafter_path()))
    assert by_flags.speculative_config["num_speculative_tokens"] == 6
    assert by_flags.spec_model is None


def test_another_speculator_is_left_to_vllm(fits):
    for asked in ({"method": "ngram", "num_speculative_tokens": 3}, {"model": str(demo_verifier_path())}, None):
        arguments = speculative_config(speculative_config=asked)
        assert arguments.speculative_config == asked
        assert arguments.additional_config == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 768}, "verifier of width 384"),
        ({"vocabulary": 50257}, "vocabulary 4,096"),
        ({"pipeline": 2}, "pipeline_parallel_size is 2"),
        ({"tokens": 7}, "num_speculative_tokens is 7.*at most 6"),
        ({"additional_config": {"recurrent_drafter": {"beam_width": 5000}}}, "beam_width is 5000"),
        ({"tensor": 2, "additional_config": {"recurrent_drafter": {"drafts": "sampled"}}}, "must draft alike"),
    ],
)
def test_drafters_that_do_not_fit(fits, changes, message):
    changes = dict(changes)
    asked = {"model": str(demo_drafter_path()), "num_speculative_tokens": changes.pop("tokens", 6)}
    with pytest.raises(ValueError, match=message):
        speculative_config(speculative_config=asked, **changes)


def test_damaged_weights(fits, tmp_path):
    for file in demo_drafter_path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        speculative_config(speculative_config={"model": str(tmp_path)})
    weights.unlink()
    with pytest.raises(ValueError, match="no \\*.safetensors"):
        speculative_config(speculative_config={"model": str(tmp_path)})
