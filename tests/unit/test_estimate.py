"""Break-even, draft vocabulary and ceiling against hand-made tables."""

import pytest
import torch
from models import tiny_model

from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.measure.estimate import (
    WeightsRead,
    break_even,
    ceiling,
    choose_draft_vocabulary,
    expected_coverage,
    expected_tokens,
    weights_read,
)
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.verifier import Verifier

H = 768
GPT2 = 124_400_000


def drafter_of(width: int, exit_dim: int) -> tuple[int, int]:
    return 2 * width * width + 2 * exit_dim * exit_dim + (
        2 * width * exit_dim if exit_dim != 2 * width else 0
    ), exit_dim


@pytest.mark.parametrize(
    ("exit_dim", "size", "expected"),
    [(2 * H, 50_257, 3.67), (2 * H, 32_000, 2.77), (2 * H, 8_192, 1.59), (H, 8_192, 1.32)],
)
def test_break_even_of_gpt2_by_weights(exit_dim, size, expected):
    assert WeightsRead(GPT2, *drafter_of(H, exit_dim)).break_even(size, 4) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("name", "tied"), [("gpt2", True), ("llama", False)])
def test_an_embedding_that_is_only_looked_up_in_is_not_read(name, tied):
    model = tiny_model(name, tie_word_embeddings=tied)
    read = weights_read(Verifier(model), 64, 1, rnn=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert read.verifier == total - (0 if tied else model.get_input_embeddings().weight.numel())
    assert (read.level, read.head_row) == (2 * 64 * 64 + 2 * 64 * 64 + 64 * 64, 64)


def zipf(vocabulary):
    return (1e9 / torch.arange(1, vocabulary + 1) ** 1.2).long()[torch.randperm(vocabulary)]


def test_a_dear_head_gets_a_small_vocabulary_and_a_cheap_one_all():
    counts = zipf(50_257)
    small = choose_draft_vocabulary(expected_coverage(counts), WeightsRead(GPT2, *drafter_of(H, H)), 4)
    larger = choose_draft_vocabulary(expected_coverage(counts), WeightsRead(10 * GPT2, *drafter_of(H, H)), 4)
    assert small < larger < 50_257 and small & (small - 1) == 0
    assert choose_draft_vocabulary(expected_coverage(counts), WeightsRead(10**15, 1, 1), 4) == 50_257
    assert choose_draft_vocabulary(expected_coverage(torch.ones(97)), WeightsRead(GPT2, 10, 10), 4) == 97


def test_a_small_sample_is_not_taken_for_the_language():
    counts = zipf(50_257)
    for size, tolerance in ((2_000, 0.07), (500_000, 0.01)):
        sample = torch.bincount(torch.multinomial(counts.double(), size, replacement=True), minlength=50_257)
        best = sample.argsort(descending=True, stable=True)[:4_096]
        truth = float(counts[best].sum() / counts.sum())
        assert expected_coverage(sample)[4_095].item() == pytest.approx(truth, abs=tolerance)


def test_of_two_tokens_that_are_everything_no_more_are_drafted():
    counts = torch.zeros(5_000, dtype=torch.int64)
    counts[[17, 4_000]] = 9
    assert choose_draft_vocabulary(expected_coverage(counts), WeightsRead(GPT2, *drafter_of(H, H)), 4) == 256


def test_measured_break_even_and_ceiling():
    costs = Costs(rows=(1, 2, 4, 8), verify=(10.0, 10.0, 12.0, 20.0), draft_level=1.0)
    assert break_even(costs, DraftShape(1, 3)) == pytest.approx(1.5)
    assert 3.0 / break_even(costs, DraftShape(1, 3)) == pytest.approx(2.0)
    assert ceiling(costs, 1.0, 3) == pytest.approx((4 / 1.5, 3))
    speed, levels = ceiling(costs, 0.4, 7)
    assert levels == 1 and speed == pytest.approx(1.4 / 1.1)
    dear = Costs(rows=(1, 2), verify=(10.0, 20.0), draft_level=1.0)
    assert ceiling(dear, 0.9, 7) == (1.0, 0)
    assert expected_tokens(1.0, 4) == 5
