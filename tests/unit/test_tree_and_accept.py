import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_drafter.core.accept import follow_tree
from recurrent_drafter.core.beam import Beams, DraftStep, beam_search
from recurrent_drafter.core.tree import DraftTree, prefix_tree, root_tree

RED, PLANET, DOT, AND, WITH, IN = range(6)


def worked_example(max_nodes: int = 7) -> DraftTree:
    """The three beams of `beam.py` after ``red``: planet and, planet with, dot in."""
    beams = Beams(
        tokens=torch.tensor([[[PLANET, DOT, IN], [AND, WITH, IN]]]),
        parents=torch.tensor([[[0, 0, 0], [0, 0, 1]]]),
        log_probs=torch.tensor([[[0.6, 0.3, 0.05], [0.3, 0.2, 0.1]]]).log(),
    )
    return prefix_tree(torch.tensor([RED]), beams, max_nodes)


def test_worked_example_by_hand():
    tree = worked_example()
    assert tree.tokens.tolist() == [[RED, PLANET, DOT, IN, AND, WITH, IN]]
    assert tree.parents.tolist() == [[0, 0, 0, 0, 1, 1, 2]]
    assert tree.depths.tolist() == [[0, 1, 1, 1, 2, 2, 2]]
    assert tree.ancestors.int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 0],
            [1, 0, 0, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],
            [1, 1, 0, 0, 0, 1, 0],
            [1, 0, 1, 0, 0, 0, 1],
        ]
    ]


def test_pruning_drops_the_least_probable_and_renumbers():
    tree = worked_example(max_nodes=4)  # red, planet .6, then dot and `planet and`, both .3
    assert tree.tokens.tolist() == [[RED, PLANET, DOT, AND]]
    assert tree.parents.tolist() == [[0, 0, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2]]


def stationary(table: torch.Tensor, root: torch.Tensor) -> DraftStep:
    """A drafter whose law P(next | token) is a table's."""

    def step(tokens, state):
        tokens = root[:, None] if tokens is None else tokens
        return table[tokens], torch.zeros(*tokens.shape, 1)

    return step


def random_beams(seed: int, batch: int, vocabulary: int, width: int, length: int) -> tuple[torch.Tensor, Beams]:
    """Beams of a random stationary law P(next | token)."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, vocabulary, generator=generator).log_softmax(-1)
    root = torch.randint(vocabulary, (batch,), generator=generator)
    return root, beam_search(stationary(table, root), torch.arange(vocabulary), width, length)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(2, 20))
def test_tree_properties(seed, batch, width, length, max_nodes):
    root, beams = random_beams(seed, batch, 5, width, length)
    whole = prefix_tree(root, beams, 1 + width * length)
    pruned = prefix_tree(root, beams, max_nodes)
    for row in range(batch):
        texts = tree_texts(whole, row)
        assert len(set(texts)) == len(texts), "each prefix stands once"
        for beam in beams.paths[row].tolist():
            assert (root[row].item(), *beam) in texts
        kept = tree_texts(pruned, row)
        assert set(kept) <= set(texts)
        assert all(text[:-1] in kept for text in kept[1:]), "closed under ancestors"
        dropped = set(texts) - set(kept)
        score = dict(zip(texts, whole.log_probs[row].tolist(), strict=True))
        assert not dropped or max(score[text] for text in dropped) <= min(score[text] for text in kept) + 1e-6
        for node, text in enumerate(kept):  # the mask of a node is its path, found by walking up
            seen = pruned.ancestors[row, node].nonzero()[:, 0].tolist()
            assert [pruned.tokens[row, i].item() for i in seen] == list(text)


def tree_texts(tree: DraftTree, row: int) -> list[tuple[int, ...]]:
    texts: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True)):
        texts.append((token,) if node == 0 else (*texts[parent], token))
    return texts


def test_beam_search_is_exhaustive_search_when_wide_enough():
    vocabulary, length = 4, 3
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(vocabulary, vocabulary, generator=generator).log_softmax(-1)
    beams = beam_search(stationary(table, torch.tensor([2])), torch.arange(vocabulary), 4, 1)
    every = {}
    for text in itertools.product(range(vocabulary), repeat=length):
        every[text] = sum(table[a, b].item() for a, b in zip((2, *text[:-1]), text, strict=True))
    best = max(every, key=every.get)
    assert sorted(beams.tokens[0, 0].tolist()) == [0, 1, 2, 3]
    # A width of V^(L-1) can lose nothing; D must be at least W, so the last level's width is reached through draft ids.
    wide = torch.randn(16, 16, generator=generator).log_softmax(-1)
    beams = beam_search(stationary(wide, torch.tensor([5])), torch.arange(16), 16, 2)
    scores = {(a, b): (wide[5, a] + wide[a, b]).item() for a in range(16) for b in range(16)}
    expected = sorted(scores, key=scores.get, reverse=True)[:16]
    assert [tuple(path) for path in beams.paths[0].tolist()] == expected
    assert torch.allclose(beams.log_probs[0, 1], torch.tensor([scores[text] for text in expected]))
    assert len(best) == length


def test_beam_wider_than_the_draft_vocabulary_is_refused():
    with pytest.raises(ValueError, match="beam_width is 6, expected at most 5"):
        random_beams(0, 1, 5, 6, 2)


@pytest.mark.parametrize(
    ("draws", "tokens", "n_accepted"),
    [
        ({0: DOT, 2: IN, 6: AND}, [DOT, IN, AND], 2),  # the whole beam, then the bonus
        ({0: PLANET, 1: IN}, [PLANET, IN], 1),  # planet, then what no child carries
        ({0: WITH}, [WITH], 0),  # nothing
        ({0: IN, 3: IN}, [IN, IN], 1),  # a leaf of depth 1
    ],
)
def test_follow_by_hand(draws, tokens, n_accepted):
    accepted = follow_tree(worked_example(), lambda node: torch.tensor([draws[int(node)]]))
    assert accepted.n_accepted.tolist() == [n_accepted]
    assert accepted.tokens[0, : n_accepted + 1].tolist() == tokens
    assert accepted.bonus_token.tolist() == [tokens[-1]]


def test_root_is_nobodys_child():
    """A verifier that repeats the root must not be led back to node 0."""
    accepted = follow_tree(worked_example(), lambda _: torch.tensor([RED]))
    assert accepted.n_accepted.tolist() == [0]
    assert follow_tree(root_tree(torch.tensor([RED])), lambda _: torch.tensor([RED])).n_accepted.tolist() == [0]


def test_emitted_law_is_the_verifiers_by_enumeration():
    """Over all draws, weighted: each output prefix has exactly the probability that autoregression gives it."""
    vocabulary = 4
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
    root, beams = random_beams(7, 1, vocabulary, 2, 2)
    tree = prefix_tree(root, beams, 5)
    nodes = tree.tokens.shape[1]
    law: dict[tuple[int, ...], float] = {}
    for outcome in itertools.product(range(vocabulary), repeat=nodes):
        weight = 1.0
        for node, token in enumerate(outcome):
            weight *= table[tree.tokens[0, node], token].item()
        accepted = follow_tree(tree, lambda node, outcome=outcome: torch.tensor([outcome[int(node)]]))
        text = tuple(accepted.tokens[0, : int(accepted.n_accepted) + 1].tolist())
        law[text] = law.get(text, 0.0) + weight
    assert sum(law.values()) == pytest.approx(1.0)
    assert max(map(len, law)) == 3, "the tree must be used"
    for text, probability in law.items():
        expected = 1.0
        for before, token in zip((int(root), *text[:-1]), text, strict=True):
            expected *= table[before, token].item()
        assert probability == pytest.approx(expected)
