"""Replies as they grow: prefixes are the text so far, criteria are asked token by token, and the step moves once."""

import random

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria

from recurrent_drafter.core.accept import Accepted
from recurrent_drafter.core.tree import root_tree
from recurrent_drafter.decoding.generation_state import GenerationState, Step


def step(tokens: list[list[int]]) -> Step:
    """Every row accepts all but its last token."""
    length = len(tokens[0])
    log_probs = np.zeros((len(tokens), length), dtype=np.float32)
    return Step(
        [length - 1] * len(tokens),
        tokens,
        [list(range(length))] * len(tokens),
        length - 1,
        log_probs,
        log_probs.astype(int),
    )


def test_prefixes_are_the_text_so_far_and_what_was_drawn():
    chance, batch = random.Random(3), 3
    prompts = torch.randint(0, 9, (batch, 5), generator=torch.Generator().manual_seed(0))
    state, kept = GenerationState(prompts, 400), prompts.clone()
    replies: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(60):
        for row in range(batch):
            for _ in range(chance.randint(0, 3)):  # asked several times between two steps, and not always
                drawn = [chance.randrange(30) for _ in range(chance.randint(0, 4))]
                expected = [*prompts[row].tolist(), *replies[row], *drawn]
                assert state.prefix(row, drawn).tolist() == [expected]
                (vocabulary,) = state.vocabulary(row, drawn).tolist()
                assert set(vocabulary) == set(expected)
                assert len(vocabulary) <= 5 + 30 + len(drawn)
        tokens = [[chance.randrange(30) for _ in range(3)] for _ in range(batch)]
        state.emit(step(tokens))
        replies = [reply + new for reply, new in zip(replies, tokens, strict=True)]
    assert torch.equal(prompts, kept), "the caller's prompts are as they were"


def test_a_criterion_sees_each_token_as_the_last_one_once():
    class Recorder(StoppingCriteria):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **_):
            self.seen.append(input_ids[0].tolist())
            return torch.tensor([input_ids[0, -1] == 7])

    recorder = Recorder()
    state = GenerationState(torch.tensor([[1, 2]]), 50, criteria=[recorder])
    assert state.emit(step([[3]])) == [[3]]
    assert state.emit(step([[4, 5, 7, 8]])) == [[4, 5, 7]]
    assert state.done
    assert recorder.seen == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 7]]


@pytest.mark.parametrize("log_prob", [0.0, -1.5, -3.25e-7, -torch.inf])
def test_tokens_and_log_probabilities_move_to_the_host_exactly(log_prob):
    token = 2**40 + 1  # a float of 32 bits does not hold it
    tree = root_tree(torch.tensor([token]))
    tree.log_probs.fill_(log_prob)
    one = torch.zeros(1, 1, dtype=torch.int64)
    accepted = Accepted(path=one, tokens=one + 3, n_accepted=one[0], bonus_token=one[0] + 3)
    moved = Step.on_host(accepted, torch.zeros(1, 1, 5), tree, GenerationState(one, 4))
    assert (moved.tokens, moved.path, moved.n_accepted, moved.drafted) == ([[3]], [[0]], [0], 0)
    assert moved.log_probs.tolist() == [[np.float32(log_prob)]]
