"""Packed weights compute what the model's own do, beside them or in their place, and give them back."""

import itertools

import pytest
import torch
from tests.models import WIDTH, generate, prompts, random_drafter, tiny_model
from transformers import AutoModelForCausalLM

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models import weight_layouts
from recurrent_drafter.models.loading import verifier_fingerprint
from recurrent_drafter.models.packed_linear import (
    FEW_ROWS,
    GradualPacking,
    PackedLinear,
    PackedLinears,
    arrange,
    pack,
    to_dense,
    unpacked,
)
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.models.weight_layouts import Blocks, Reordered

CLOSE = {"rtol": 1e-4, "atol": 1e-3}


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    """What other tests' clocks have said is not known here."""
    monkeypatch.setattr(weight_layouts, "_found", {})


def later_is_faster():
    """A clock by which each interval is shorter than the one before, so that a packed weight is the fastest."""
    times = itertools.accumulate(1 / count for count in itertools.count(1))
    return lambda: next(times)


def earlier_is_faster():
    """A clock by which the weights as they are are the fastest."""
    times = itertools.accumulate(itertools.count(1))
    return lambda: next(times)


@pytest.mark.parametrize("arrange", [Reordered, Blocks])
@pytest.mark.parametrize("shape", [(64, 96), (257, 64)])
def test_a_packed_weight_computes_the_same_and_is_given_back_bit_by_bit(arrange, shape):
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    packed = arrange(weight)
    assert torch.equal(packed.dense(), weight)
    for rows in (1, 2, 17, 200):
        x = torch.randn(1, rows, shape[1])
        for given in (None, bias):
            torch.testing.assert_close(packed(x, given), torch.nn.functional.linear(x, weight, given), **CLOSE)


def test_packed_weights_beside_a_model_leave_no_trace():
    model = tiny_model("gpt2")
    packed = PackedLinears(model)
    layer = model.transformer.h[0].mlp.c_fc
    with torch.inference_mode():
        for rows in (1, 2, 17, FEW_ROWS[-1], FEW_ROWS[-1] + 1):
            x = torch.randn(1, rows, WIDTH)
            expected = layer(x)
            with packed.applied():
                assert "forward" in vars(layer)
                torch.testing.assert_close(layer(x), expected, **CLOSE)
        assert "forward" not in vars(layer)
    x = torch.randn(1, 3, WIDTH)
    for change in (layer.weight.mul_, layer.weight.data.add_, layer.weight.data.copy_):  # packed again after each
        with torch.no_grad():
            change(torch.rand_like(layer.weight))
        with torch.inference_mode(), packed.applied():
            expected = torch.addmm(layer.bias, x[0], layer.weight)[None]
            torch.testing.assert_close(layer(x), expected, **CLOSE)


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_packed_weights_in_place_decode_the_same_and_are_given_back(architecture, tied, tmp_path):
    model, drafter = tiny_model(architecture, tie_word_embeddings=tied), random_drafter()
    ids, mask = prompts(2)
    expected = generate(model, ids, mask)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fingerprint, embedding = verifier_fingerprint(Verifier(model)), model.get_input_embeddings().weight
    parameters = {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}
    done = []
    beside = PackedLinears(model)
    pack(model, lambda *progress: done.append(progress), clock=later_is_faster())
    assert beside.forwards() == [] and beside.nbytes == 0
    layers = packed_layers(model)
    assert layers and done == [(number, done[-1][1]) for number in range(1, done[-1][1] + 1)]
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()} == parameters
    assert torch.equal(generate(model, ids, mask, custom_generate=RecurrentDraftingSpeculator(drafter)), expected)
    assert torch.equal(generate(model, ids, mask), expected)
    held = sum(weight.untyped_storage().nbytes() for weight in {id(w): w for w in model.parameters()}.values())
    assert held < sum(weight.nbytes for weight in before.values())  # what was packed is given up

    packed = model.state_dict()
    assert list(packed) == list(before) and all(torch.equal(packed[name], before[name]) for name in before)
    assert verifier_fingerprint(Verifier(model)) == fingerprint
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    with unpacked(model):
        assert not packed_layers(model)
        assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert packed_layers(model) == layers
    to_dense(model)
    assert not packed_layers(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert torch.equal(generate(model, ids, mask), expected)
    assert (model.get_output_embeddings().weight is embedding) == tied


def test_a_packed_model_that_is_converted_has_the_weights_of_its_own_again():
    model, ids = tiny_model("llama"), prompts(1)[0]
    pack(model, clock=later_is_faster())
    assert packed_layers(model)
    converted, expected = model.to(torch.bfloat16), tiny_model("llama").to(torch.bfloat16)
    assert not packed_layers(model)
    assert torch.equal(converted(ids).logits, expected(ids).logits)


def test_what_would_not_be_faster_stays_as_it_is():
    model = tiny_model("llama")
    weights = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    pack(model, clock=earlier_is_faster())
    arrange(model, clock=earlier_is_faster())
    beside = PackedLinears(model)
    assert beside.forwards() == [] and beside.nbytes == 0
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == weights


def test_packing_goes_on_while_decoding_and_takes_its_share():
    model, now = tiny_model("llama"), [0.0]
    beside = PackedLinears(model)

    def clock():
        now[0] += 0.01  # each look at the clock takes a hundredth of a second
        return now[0]

    packing, seen = GradualPacking([beside], clock), [0]
    assert packing.forwards == []
    while not beside.is_complete:
        now[0] += 1.0  # a step
        packing.go_on()
        seen.append(len(packing.forwards))
        assert now[0] < 1000, "it comes to an end"
    assert seen == sorted(seen)
    assert len(set(seen)) > 2, "bit by bit"
    assert seen[-1] == len(beside.forwards()) > 0
    packing.go_on()
    assert len(packing.forwards) == seen[-1]


def test_a_model_met_while_decoding_is_packed_meanwhile_and_says_the_same():
    model = tiny_model("llama")
    ids, mask = prompts(1)
    expected = generate(model, ids, mask)
    speculator = RecurrentDraftingSpeculator(random_drafter())
    for _ in range(3):
        assert torch.equal(generate(model, ids, mask, custom_generate=speculator), expected)
    attached = RecurrentDraftingSpeculator(random_drafter())
    attached.attach_verifier(model)
    assert all(linears.is_complete for linears in attached.packed)
    plain = RecurrentDraftingSpeculator(lookup=False)
    plain.attach_verifier(model)
    assert sum(linears.nbytes for linears in plain.packed) == 0, "plain decoding of one row needs no copy"
