"""The recurrent drafter (ReDrafter, arXiv 2403.09919, section 3).

Which hidden state meets which token is the one thing that everything hangs on. On the text ``Mars is a red planet``,
with one token per word, the verifier's hidden state ``h_t`` is the one from which it predicts token t + 1:

    ============  ======  ====  ====  =====  ========
    position p       0      1     2     3       4
    token x_p      Mars    is     a    red    planet
    hidden h_p      h_0    h_1   h_2   h_3     h_4
    ============  ======  ====  ====  =====  ========

A draft starts from a *root*: the newest verified token x_p, whose own hidden state does not exist yet because the
verifier has not read it. So the root at p = 2 is ``a``, and what comes with it is h_1, the state from which ``a`` was
predicted. Depth 1 reads ``a`` and predicts ``red``; depth 2 reads ``red`` and predicts ``planet``. Training pairs
(h_{p-1}, x_p) with the targets y_1 .. y_K = x_{p+1} .. x_{p+K}, decoding pairs the same two. Pairing h_p with these
targets would hand the drafter the answer: a wonderful loss, and nothing accepted.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedModel

from recurrent_drafter.core.losses import ChunkLoss, chunked_loss
from recurrent_drafter.models.config import RecurrentDraftingConfig


class ResidualLayer(nn.Module):
    """z + SiLU(Linear(z))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:  # (..., E) -> (..., E)
        """Apply the layer to z (..., E)."""
        return z + functional.silu(self.linear(z))


class InputProjection(nn.Linear):
    """``A h + B s + b`` of hidden state and recurrent state (2H -> E), a half at a time.

    ``A h + b`` is the same for every depth and beam: `of_hidden` computes it once. The forward pass is ``B s``.
    """

    @property
    def forward_weight(self) -> Tensor:
        """``B`` (E, H)."""
        return self.weight[:, self.in_features // 2 :]

    def forward(self, state: Tensor) -> Tensor:  # (..., H) -> (..., E)
        """The recurrent state's half."""
        return functional.linear(state, self.forward_weight)

    def of_hidden(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., E)
        """The hidden state's half, with the bias."""
        return functional.linear(hidden, self.weight[:, : self.in_features // 2], self.bias)


class RecurrentDrafter(PreTrainedModel):
    """Predicts the tokens after a root from the verifier's hidden state and the tokens drafted so far.

    The recurrence stands in `advance` alone; training (`exits`) and beam search (`step`) call it. Tokens enter as the
    verifier's own input embeddings, which are not part of the drafter. Parameters carry the names of Apple's released
    layout (``input_proj``, ``lm_head.i.linear``, ``lm_head.L``, ``rnn_u``, ``rnn_w``).
    """

    config_class = RecurrentDraftingConfig
    config: RecurrentDraftingConfig
    base_model_prefix = ""
    draft_ids: Tensor  # (D,) the verifier's id of each draft token (``d2t``)

    def __init__(self, config: RecurrentDraftingConfig) -> None:
        super().__init__(config)
        hidden, exit_dim, draft_vocab = config.hidden_size, config.exit_dim, config.draft_vocab_size
        if exit_dim != 2 * hidden:
            self.input_proj = InputProjection(2 * hidden, exit_dim)
        if config.rnn:
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
            self.rnn_u = nn.Linear(hidden, hidden)
        if config.emb_norm:
            self.emb_norm = nn.RMSNorm(hidden, eps=1e-6)
        head = nn.Linear(exit_dim, draft_vocab, bias=False)
        self.lm_head = nn.Sequential(*(ResidualLayer(exit_dim) for _ in range(config.num_draft_layers)), head)
        self.register_buffer("draft_ids", torch.arange(draft_vocab))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: tokens enter as the verifier's embeddings. Accelerate asks when it shards."""

    def get_output_embeddings(self) -> None:
        """None: a head that `unroll` reads layer by layer must not be sharded apart from what reads it."""

    def context(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., E), or (..., H) at E = 2H
        """The hidden state's share of the head's input: the same for every depth and beam, so computed once."""
        return self.input_proj.of_hidden(hidden) if hasattr(self, "input_proj") else hidden

    def read(self, embedded: Tensor) -> Tensor:  # (..., H) -> (..., H)
        """A token's share of the recurrence, from the verifier's embedding of it: `W e(x)`, or e(x) without an RNN.

        It depends on nothing but the token, so a beam search looks it up.
        """
        if self.config.emb_norm:
            embedded = self.emb_norm(embedded)
        return self.rnn_w(embedded) if self.config.rnn else embedded

    def advance(self, read: Tensor, state: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """One depth of the recurrence (paper, equations 1 and 2), up to what the head reads.

        Args:
            read: (..., H), what `read` made of the token before the one to predict.
            state: (..., H), zeros at the root.
            context: what `context` made of the hidden state, broadcastable to the state.

        Returns:
            The head's input (..., E), and the new state (..., H).
        """
        state = functional.silu(read + self.rnn_u(state)) if self.config.rnn else state + read
        if hasattr(self, "input_proj"):
            z = context + self.input_proj(state)
        else:
            z = torch.cat([context.expand_as(state), state], dim=-1)
        return self.lm_head[:-1](z), state

    def step(self, read: Tensor, state: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """As `advance`, with logits over the draft vocabulary (..., D) for the head's input."""
        z, state = self.advance(read, state, context)
        return self.lm_head[-1](z), state

    def exits(self, hidden: Tensor, embedded: Tensor) -> Tensor:  # (P, H), (P, K, H) -> (P, K, E)
        """What the head reads at all K depths along given tokens: root first, then the targets' own earlier tokens."""
        _, depths, _ = embedded.shape
        context, state, reads = self.context(hidden), torch.zeros_like(hidden), self.read(embedded)
        exits = []
        for depth in range(depths):
            z, state = self.advance(reads[:, depth], state, context)
            exits.append(z)
        return torch.stack(exits, dim=1)

    def unroll(self, hidden: Tensor, embedded: Tensor) -> Tensor:  # (P, H), (P, K, H) -> (P, K, D)
        """Logits of all K depths along given tokens."""
        return self.lm_head[-1](self.exits(hidden, embedded))

    def forward(
        self, hidden: Tensor, embedded: Tensor, loss: ChunkLoss | None = None, chunk: int | None = None
    ) -> Tensor:  # (P, H), (P, K, H) -> (P, K, D), or ()
        """`unroll`, or with a ``loss`` its sum over chunks of roots, and never all logits at a time."""
        if loss is None:
            return self.unroll(hidden, embedded)
        return chunked_loss(self.exits(hidden, embedded), self.lm_head[-1].weight, loss, chunk or len(hidden) or 1)


AutoConfig.register(RecurrentDraftingConfig.model_type, RecurrentDraftingConfig)
AutoModel.register(RecurrentDraftingConfig, RecurrentDrafter)
