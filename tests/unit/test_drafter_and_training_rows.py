import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModel

from recurrent_drafter import DraftShape, RecurrentDrafter, RecurrentDraftingConfig
from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.core.metrics import walk
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.decoding.generation_state import GenerationState, Step
from recurrent_drafter.training.examples import cut_after_end, frequent_tokens, loss_mask, with_text_targets

H, V, END = 8, 12, 9


def drafter(**options) -> RecurrentDrafter:
    torch.manual_seed(0)
    return RecurrentDrafter(RecurrentDraftingConfig(hidden_size=H, vocab_size=V, **options)).eval()


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("emb_norm", [True, False])
@pytest.mark.parametrize("exit_dim", [H, 2 * H, 5])
@pytest.mark.parametrize("layers", [0, 2])
def test_unroll_is_the_mathematics(rnn, emb_norm, exit_dim, layers):
    model = drafter(rnn=rnn, emb_norm=emb_norm, exit_dim=exit_dim, num_draft_layers=layers, draft_vocab_size=7)
    hidden, embedded = torch.randn(3, H), torch.randn(3, 4, H)
    state = torch.zeros(3, H)
    for depth in range(4):
        e = embedded[:, depth]
        if emb_norm:
            e = e / (e.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * model.emb_norm.weight
        if rnn:
            state = functional.silu(e @ model.rnn_w.weight.T + state @ model.rnn_u.weight.T + model.rnn_u.bias)
        else:
            state = state + e
        z = torch.cat([hidden, state], -1)
        if exit_dim != 2 * H:
            z = z @ model.input_proj.weight.T + model.input_proj.bias
        for layer in range(layers):
            z = z + functional.silu(z @ model.lm_head[layer].linear.weight.T + model.lm_head[layer].linear.bias)
        expected = z @ model.lm_head[layers].weight.T
        assert expected.shape == (3, 7)
        torch.testing.assert_close(model.unroll(hidden, embedded)[:, depth], expected, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_again(tmp_path):
    model = drafter(draft_vocab_size=5, beam_width=3, beam_length=2)
    model.draft_ids.copy_(torch.tensor([1, 3, 4, 9, 11]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, RecurrentDrafter)
    assert again.config.draft_shape == DraftShape(3, 2)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_vocab_size": V + 1}, "draft_vocab_size is 13"),
        ({"num_draft_layers": -1}, "num_draft_layers is -1"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentDraftingConfig(hidden_size=H, vocab_size=V, **options)


@pytest.mark.parametrize("shape", [(0, 4, None), (4, 0, None), (4, 4, 1)])
def test_shape_is_checked(shape):
    with pytest.raises(ValueError, match="expected at least"):
        DraftShape(*shape)


def test_rows_of_the_worked_alignment():
    """Two replies: roots are their tokens but the end token; targets stop with the reply and after its end token."""
    #                        user   reply 0       user  reply 1, cut off
    ids = torch.tensor([1, 2, 3, 4, 5, END, 1, 6, 7, 8])
    spans = torch.tensor([-1, -1, 0, 0, 0, 0, -1, 1, 1, 1])
    row = with_text_targets(TrainExample(ids, spans), 3, [END])
    assert row.positions.tolist() == [2, 3, 4, 7, 8, 9]  # 3 is the reply's first token: it counts as a root
    x = IGNORED
    assert row.targets.tolist() == [[4, 5, END], [5, END, x], [END, x, x], [7, 8, x], [8, x, x], [x, x, x]]


def test_first_token_is_no_root_and_end_tokens_may_go_on():
    ids, spans = torch.tensor([1, END, 2]), torch.tensor([0, 0, 0])
    assert loss_mask(TrainExample(ids, spans), [END]).tolist() == [False, False, True]
    assert loss_mask(TrainExample(ids, spans), []).tolist() == [False, True, True]
    assert with_text_targets(TrainExample(ids, spans), 2, []).targets.tolist() == [[2, IGNORED], [IGNORED, IGNORED]]


def test_targets_after_an_end_token_do_not_count():
    targets = torch.tensor([[1, END, 2, END], [END, 1, 1, 1], [1, 2, 3, 4]])
    cut = cut_after_end(targets, (END,))
    assert cut.tolist() == [[1, END, IGNORED, IGNORED], [END] + [IGNORED] * 3, [1, 2, 3, 4]]
    assert torch.equal(cut_after_end(targets, ()), targets)


def test_draft_vocabulary_is_the_most_frequent_and_holds_the_end_token():
    example = with_text_targets(
        TrainExample(torch.tensor([0, 5, 5, 5, 7, 7, 3]), torch.zeros(7, dtype=torch.int64)), 1, [END]
    )
    assert frequent_tokens([example], 3, V, [END]).tolist() == [5, 7, END]


@pytest.mark.parametrize(
    ("n_accepted", "steps", "tokens"),
    [([5], 0, 0), ([0, 0], 1, 1), ([1, 0, 0], 1, 2), ([9, 0, 0, 0], 1, 3), ([0, 2, 0, 0, 0], 2, 4)],
)
def test_walk_by_hand(n_accepted, steps, tokens):
    result = walk(n_accepted)
    assert (result.steps, result.tokens) == (steps, tokens)


def test_stop_cuts_inside_an_accepted_path():
    stop = GenerationState(torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=4, end_ids=[END])

    def emit(tokens, n_accepted):
        path = [list(range(len(row))) for row in tokens]
        return stop.emit(Step(n_accepted, tokens, path, 4, np.zeros((len(tokens), 3)), np.ones((len(tokens), 3), int)))

    assert emit([[1], [2]], [0, 0]) == [[1], [2]]
    assert stop.remaining == 3
    assert emit([[3, END, 5], [4, 6, 6]], [2, 1]) == [[3, END], [4, 6]]
    assert (stop.rows, stop.stayed, stop.done) == ([1], [1], False)  # row 0 has ended, and leaves the batch
    assert emit([[7, 8, 8]], [2]) == [[], [7]]  # row 1 is full
    assert stop.done
    assert list(map(len, stop.drafts)) == [1, 2]
    assert stop.drafts == [[(4, 2)], [(4, 1), (4, 1)]]  # accepted and emitted: what lies after an end is not
