"""The verifier: any stock Hugging Face causal LM, read through its own forward pass.

This file and ``cache.py`` are the only ones that know how Hugging Face models are called.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recurrent_drafter.core.tree import DraftTree
from recurrent_drafter.models.cache import TreeCache, put_after
from recurrent_drafter.models.compatibility import why_unsuitable
from recurrent_drafter.models.grouped_attention import finds_attention_by_name, grouped
from recurrent_drafter.models.packed_linear import fingerprint

READ_AT_ONCE = 512  # tokens that are read after others at a time: each has a row in a mask over all of them


@dataclass(frozen=True)
class Pass:
    """What one forward pass yields: logits (B, N, V), and hiddens (B, N, H), the LM head's own input."""

    logits: Tensor
    hiddens: Tensor


class Verifier:
    """A causal LM that can verify trees. Holds no state between calls; the model is used as it is.

    Raises ValueError, with the reason, for models that cannot verify a tree or cannot be drafted for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        reason = why_unsuitable(model)
        if reason is not None:
            raise ValueError(f"{type(model).__name__} cannot be a verifier: {reason}")
        self.model = model
        self.head: nn.Module = model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self.embedding: nn.Module = model.get_input_embeddings()
        self.vocab_size, self.hidden_size = self._head_shape
        # As transformers' own `create_masks_for_generate` reads a config: where layers have types, one mask for each
        # type; else one mask for all, which slides if there is a window.
        self._kinds: list[str] = sorted(set(getattr(self.config, "layer_types", None) or ()))
        slides = "sliding_attention" in self._kinds or not self._kinds
        self.window: int | None = (getattr(self.config, "sliding_window", None) or None) if slides else None
        self._rope: dict[str, Any] = getattr(self.config, "rope_parameters", None) or {}
        # Then a lone token, and a whole text without pads, need no mask: transformers asks torch for a causal pass.
        self.is_causal = self.window is None and self.config._attn_implementation == "sdpa"
        self.groups_heads = finds_attention_by_name(model)  # set it to False for the model's own attention
        self.hidden_bias = torch.finfo(model.dtype).min

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether this is still a view of the model: false for another one, or if its embeddings were exchanged."""
        return (
            self.model is model
            and self.head is model.get_output_embeddings()
            and self.embedding is model.get_input_embeddings()
            and self.vocab_size == self._head_shape[0]
        )

    @property
    def _head_shape(self) -> tuple[int, int]:
        rows, width = next(self.head.parameters()).shape  # its `weight`, which takes long to read where it is packed
        return rows, width

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def weights_version(self) -> tuple[object, ...]:
        """Changes when weights do: trained, moved, cast, or written to, as far as `fingerprint` sees."""
        return self.model.dtype, self.device, *map(fingerprint, self.model.parameters())

    @property
    def context_length(self) -> int | None:
        """The most positions that the model computes alike; None when its config names no limit.

        Rotary frequencies of type longrope change for a whole pass once it reaches beyond the original context.
        """
        limit: int | None = getattr(self.config, "max_position_embeddings", None)
        if self._rope.get("rope_type") == "longrope":
            limit = self._rope.get("original_max_position_embeddings", limit)
        return limit

    @property
    def last_position(self) -> int | None:
        """The last position that may be asked for, where that is a hard limit: of a table, or of `context_length`."""
        bounded = not self._rope or self._rope.get("rope_type") in ("longrope", "dynamic")
        return self.context_length - 1 if bounded and self.context_length is not None else None

    def embed(self, tokens: Tensor) -> Tensor:  # (...) -> (..., H)
        """The model's own input embedding of tokens."""
        return self.embedding(tokens)

    def hiddens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # (B, S) -> (B, S, H)
        """Last hidden states of whole sequences, as the LM head reads them, without paying for the head."""
        positions = None if attention_mask is None else positions_under(attention_mask)
        with self._attention(), self._head_reading(lambda given: given[:, -1:]) as captured:
            self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return captured[0]

    def logits(self, hiddens: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """The model's own logits of what its head reads, by its own forward pass: soft caps and scales included.

        The model reads one token meanwhile, whose place before the head ``hiddens`` take.
        """
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self._head_reading(lambda given: hiddens.flatten(0, -2)[None].to(given.dtype)):
            output = self.model(input_ids=token, use_cache=False)
        return output.logits.view(*hiddens.shape[:-1], -1)

    @contextmanager
    def sharded(self) -> Iterator[None]:
        """Within it each process keeps a share of every layer, and a pass gathers one layer at a time.

        So all processes have to run the same passes. Embeddings and head stay whole, as do layers of mixed or
        quantized parameters. Afterwards, unless it ends by an error, every process holds the whole model again.
        """
        from torch.distributed.fsdp import fully_shard  # imported here: not every build of torch has it

        names = set(self.model._no_split_modules or ())
        layers = [module for module in self.model.modules() if type(module).__name__ in names]
        kinds = {parameter.dtype for layer in layers for parameter in layer.parameters()}
        if len(kinds) != 1 or not kinds.pop().is_floating_point:
            layers = []
        shards = [fully_shard(layer, reshard_after_forward=True) for layer in layers]
        yield  # an error may be this process's alone, and then nobody would gather with it
        for shard in shards:
            shard.set_reshard_after_forward(False)
            shard.unshard()

    def as_bias(self, visible: Tensor) -> Tensor:
        """A boolean mask as an additive one in the model's dtype, which every attention implementation takes."""
        bias = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device)
        return bias.masked_fill_(~visible, self.hidden_bias)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        cache: TreeCache,
        *,
        distance: Tensor | None = None,
        last_only: bool = False,
    ) -> Pass:
        """One pass over N new tokens per row, after the cache's kept columns.

        Args:
            tokens: (B, N). positions: (B, N), the position that each token stands for.
            visible: (B, N, kept + N) additive mask in the model's dtype, 0 where a token may look; None for a causal
                pass without pads, if the model `is_causal` and N is 1 or nothing is kept.
            cache: the columns so far. It keeps none of the new ones by itself.
            distance: (B, N, kept + N), how many tokens back each column lies; needed where there is a ``window``.
            last_only: logits for the last token only, (B, 1, V).
        """
        head = self._head_reading(lambda given: given[:, -1:] if last_only else given)
        with self._attention(), head as captured:
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=None if visible is None else self._masks(visible[:, None], distance),
                past_key_values=cache,
                use_cache=True,
            )
        return Pass(output.logits, captured[0])

    def _masks(self, visible: Tensor, distance: Tensor | None) -> Tensor | dict[str, Tensor]:  # (B, 1, N, columns)
        if self.window is None:
            return visible
        if distance is None:
            raise ValueError(
                f"{self.config.model_type} attends to a window of {self.window} tokens: distance is needed"
            )
        sliding = visible.masked_fill(distance[:, None] >= self.window, self.hidden_bias)
        if len(self._kinds) < 2:
            return sliding
        return {"full_attention": visible, "sliding_attention": sliding}

    def open(self, input_ids: Tensor, attention_mask: Tensor | None, capacity: int) -> tuple["VerifierSession", Pass]:
        """Read the prompts (B, S), left-padded where ``attention_mask`` is 0; return the session and the last pass."""
        _, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        own = attention_mask.bool()
        columns = torch.arange(length, device=input_ids.device)
        distance = (columns[:, None] - columns)[None]  # (1, S, S)
        visible = None
        if not self.is_causal or not own.all():
            # A pad sees itself, or its softmax would have nothing to sum over; nothing sees a pad.
            visible = self.as_bias((distance == 0) | ((distance > 0) & own[:, None, :]))
        cache = TreeCache(self.config.num_hidden_layers, max(capacity, length))
        positions = positions_under(attention_mask)
        result = self.forward(input_ids, positions, visible, cache, distance=distance, last_only=True)
        cache.keep_all()
        return VerifierSession(self, cache, own, is_causal=visible is None), result

    def _attention(self) -> AbstractContextManager[None]:
        return grouped(self.config) if self.groups_heads else nullcontext()

    @contextmanager
    def _head_reading(self, instead: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
        """Collect what the LM head is given; it computes from what ``instead`` makes of that."""
        captured: list[Tensor] = []

        def collect(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            captured.append(args[0])
            return (instead(args[0]), *args[1:])

        handle = self.head.register_forward_pre_hook(collect)
        try:
            yield captured
        finally:
            handle.remove()


class VerifierSession:
    """The verified text of a batch: its cache, which begins with the prompts, and what of these each row may see.

    ``own`` (B, S) is False where the prompts are padded; ``is_causal``: the model is so, and there are no pads.
    """

    def __init__(self, verifier: Verifier, cache: TreeCache, own: Tensor, *, is_causal: bool = False) -> None:
        self.verifier, self.cache, self._is_causal = verifier, cache, is_causal
        self._pads = (~own).sum(1, keepdim=True)  # (B, 1)
        # (B, capacity): pads are hidden; how far a row's text reaches is the cache's knowledge.
        self._prompt_bias = nn.functional.pad(verifier.as_bias(own), (0, cache.capacity - own.shape[1]))

    @property
    def lengths(self) -> list[int]:
        """Columns kept per row, its prompt's pads included."""
        return self.cache.lengths

    def forward_tree(self, tree: DraftTree) -> Pass:
        """Verify a tree: every node sees the verified text and its own ancestors, at its depth's position."""
        _, nodes = tree.tokens.shape
        base, width = self.cache.base, self.cache.longest + nodes
        positions = tree.depths + (base - self._pads)
        distance = self._distance(positions, width) if self.verifier.window is not None else None
        last = self.verifier.last_position
        if last is not None:  # rows differ in what they may still emit: a tree may reach further than one ever will
            positions[:, 1:].clamp_(max=last)
        visible = None
        if not self._is_causal or nodes > 1 or not isinstance(base, int):
            visible = self._visible(tree, width)
        return self.verifier.forward(tree.tokens, positions, visible, self.cache, distance=distance)

    def _visible(self, tree: DraftTree, width: int) -> Tensor:  # -> (B, N, columns)
        """What each node sees, as an additive mask; for a lone root it may be a view."""
        nodes, base = tree.tokens.shape[1], self.cache.base
        missing = width - self._prompt_bias.shape[1]
        if missing > 0:
            self._prompt_bias = nn.functional.pad(self._prompt_bias, (0, max(missing, width)))
        bias = self._prompt_bias[:, None, :width]
        if nodes > 1 or not isinstance(base, int):
            bias = bias.repeat(1, nodes, 1)
            if not isinstance(base, int):
                stale = torch.arange(width, device=bias.device) >= base  # (B, columns), the tree's own among them
                bias.masked_fill_(stale[:, None], self.verifier.hidden_bias)
            put_after(bias, base, self.verifier.as_bias(tree.ancestors))
        return bias

    def crop(self, length: int) -> None:
        """Keep the first columns only, so many in each row."""
        self.cache.lengths = [length] * len(self.lengths)

    def read(self, tokens: Tensor) -> Pass:  # (B, N)
        """Read text after what is kept, where rows agree in that and have no pads, and keep it; the last pass.

        Its logits are (B, 1, V): of the last token alone.
        """
        for some in tokens.split(READ_AT_ONCE, dim=1):
            kept = self.cache.longest
            columns = torch.arange(kept + some.shape[1], device=some.device)
            distance = (columns[kept:, None] - columns)[None]  # (1, N, columns)
            visible = None if self._is_causal and some.shape[1] == 1 else self.verifier.as_bias(distance >= 0)
            new = columns[None, kept:]
            last = self.verifier.forward(some, new, visible, self.cache, distance=distance, last_only=True)
            self.crop(len(columns))
        return last

    def keep(self, path: Tensor, n_accepted: list[int]) -> None:
        """Add to each row's text the first 1 + ``n_accepted`` nodes of its path (B, 1 + depth)."""
        self.cache.keep(path, n_accepted)

    def select(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, ascending."""
        if len(rows) == len(self.lengths):
            return
        self.cache.select(rows)
        index = torch.tensor(rows).to(self._pads.device, non_blocking=True)
        self._pads, self._prompt_bias = self._pads[index], self._prompt_bias[index]

    def _distance(self, positions: Tensor, width: int) -> Tensor:  # (B, N) -> (B, N, columns)
        """How many tokens each column lies before each node; a column of the text stands where its number says."""
        columns = torch.arange(width, device=positions.device) - self._pads
        put_after(columns[:, None], self.cache.base, positions[:, None])  # the tree's own, after each row's text
        return positions[:, :, None] - columns[:, None]


def positions_under(attention_mask: Tensor) -> Tensor:  # (B, S) -> (B, S)
    """Positions that count only what is not masked, as `generate` gives them."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)
