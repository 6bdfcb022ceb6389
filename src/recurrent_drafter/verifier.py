"""The verifier: any stock Hugging Face causal LM, read through its own forward pass (layer 2).

This file and ``cache.py`` are the only ones that know how Hugging Face models are called.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.cache import TreeCache
from recurrent_drafter.tree import DraftTree


@dataclass(frozen=True)
class Pass:
    """What one forward pass yields: logits (B, N, V), and hiddens (B, N, H), the LM head's own input."""

    logits: Tensor
    hiddens: Tensor


class Verifier:
    """A causal LM that can verify trees. Holds no state between calls; the model is used as it is.

    Raises ValueError for models without a language-model head or with position schemes that a tree cannot be given.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no language-model head: expected a causal LM")
        config = model.config.get_text_config()
        if getattr(config, "alibi", False) or config.model_type == "bloom":
            raise ValueError(
                f"{config.model_type} derives positions from the attention mask (ALiBi), which a tree cannot be given: "
                "expected a model that takes position_ids"
            )
        self.model = model
        self.head = head
        self.config = config
        self.embedding: nn.Module = model.get_input_embeddings()
        self.vocab_size: int = head.weight.shape[0]
        self.hidden_size: int = head.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.device

    @property
    def context_length(self) -> int | None:
        """The most positions that the model was made for; None when its config names no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def embed(self, tokens: Tensor) -> Tensor:  # (...) -> (..., H)
        """The model's own input embedding of tokens."""
        return self.embedding(tokens)

    def hiddens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # (B, S) -> (B, S, H)
        """Last hidden states of whole sequences, as the LM head reads them, without paying for the head."""
        with self._head_input(keep_rows=1) as captured:
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return captured[0]

    def forward(
        self, tokens: Tensor, positions: Tensor, visible: Tensor, cache: TreeCache, *, last_only: bool = False
    ) -> Pass:
        """One pass over N new tokens per row, behind the cache's kept columns.

        Args:
            tokens: (B, N). positions: (B, N), the position that each token stands for.
            visible: (B, N, kept + N) additive mask in the model's dtype, 0 where a token may look.
            last_only: logits for the last token only, (B, 1, V).
        """
        with self._head_input(keep_rows=1 if last_only else None) as captured:
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=visible[:, None],
                past_key_values=cache,
                use_cache=True,
            )
        return Pass(output.logits, captured[0])

    def open(self, input_ids: Tensor, attention_mask: Tensor | None, capacity: int) -> tuple["VerifierSession", Pass]:
        """Read the prompts (B, S), left-padded where ``attention_mask`` is 0; return the session and the last pass."""
        batch, length = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        own = attention_mask.bool()
        session = VerifierSession(self, TreeCache(self.config.num_hidden_layers, max(capacity, length)), batch)
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        # A pad sees itself, or its softmax would have nothing to sum over; nothing sees a pad.
        seen = causal & (own[:, None, :] | torch.eye(length, dtype=torch.bool, device=input_ids.device))
        result = self.forward(input_ids, positions, session.as_bias(seen), session.cache, last_only=True)
        session.cache.length = length
        session.prefix_bias = session.as_bias(own)[:, None, :]
        session.positions = positions[:, -1] + 1
        return session, result

    @contextmanager
    def _head_input(self, keep_rows: int | None) -> Iterator[list[Tensor]]:
        """Collect what the LM head is given; let it compute only the last ``keep_rows`` positions if asked."""
        captured: list[Tensor] = []

        def collect(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            captured.append(args[0])
            return None if keep_rows is None else (args[0][:, -keep_rows:], *args[1:])

        handle = self.head.register_forward_pre_hook(collect)
        try:
            yield captured
        finally:
            handle.remove()


class VerifierSession:
    """The verified text of a batch: its cache, which columns each row may see, and the position that comes next."""

    def __init__(self, verifier: Verifier, cache: TreeCache, batch: int) -> None:
        self.verifier, self.cache = verifier, cache
        self._hidden = torch.finfo(verifier.model.dtype).min
        self.prefix_bias = torch.zeros(batch, 1, 0, dtype=verifier.model.dtype, device=verifier.device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=verifier.device)

    def as_bias(self, visible: Tensor) -> Tensor:
        """A boolean mask as an additive one in the model's dtype, which every attention implementation takes."""
        bias = torch.zeros(visible.shape, dtype=self.verifier.model.dtype, device=visible.device)
        return bias.masked_fill_(~visible, self._hidden)

    def forward_tree(self, tree: DraftTree) -> Pass:
        """Verify a tree: every node sees the verified text and its own ancestors, at its depth's position."""
        _, nodes = tree.tokens.shape
        if nodes == 1:
            bias = nn.functional.pad(self.prefix_bias, (0, 1))  # its own column
        else:
            bias = torch.cat([self.prefix_bias.expand(-1, nodes, -1), self.as_bias(tree.ancestors)], dim=2)
        return self.verifier.forward(tree.tokens, self.positions[:, None] + tree.depths, bias, self.cache)

    def select(self, rows: list[int]) -> None:
        """Temporary."""
        index = torch.tensor(rows)
        self.cache.keys, self.cache.values = self.cache.keys[:, index], self.cache.values[:, index]
        self.prefix_bias, self.positions = self.prefix_bias[index], self.positions[index]

    def keep(self, path: Tensor, accepted: list[int]) -> None:
        """Add each row's accepted path (B, M) to its text."""
        kept = max(accepted) + 1
        n_accepted = torch.tensor(accepted, device=path.device)
        self.cache.keep(path[:, :kept])
        columns = torch.arange(kept, device=path.device)
        self.prefix_bias = torch.cat([self.prefix_bias, self.as_bias(columns <= n_accepted[:, None])[:, None]], dim=2)
        self.positions = self.positions + n_accepted + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of the vocabulary: which id stands for which token."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def computes_in_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 arithmetic; a CPU without it emulates, many times slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_verifier(
    name: str, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a directory, the Hub, or the package (``demo``), ready to generate.

    Raises OSError, in one line, when there is no such model or it cannot be read.
    """
    path = str(demo_verifier_path()) if name == "demo" else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        dtype = "bfloat16" if computes_in_bfloat16(device) else "float32"
    if name != "demo" and (name.startswith((".", "/", "~")) and not Path(name).expanduser().exists()):
        raise OSError(f"there is no model at {name}: expected a directory, a hub name or 'demo'")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"the model {name!r} could not be loaded ({type(error).__name__}: {reason}): expected a directory or a hub "
            "name of a causal language model in safetensors, or 'demo' (the bundled one)"
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]
