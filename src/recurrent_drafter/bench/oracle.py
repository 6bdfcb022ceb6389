"""A drafter that is right as often as one likes: the engine's speed without trained weights."""

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from recurrent_drafter.core.beam import Beams, Deeper
from recurrent_drafter.decoding.decode import BeamDrafter, Embed
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.measure.tuning import REJECTED
from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter


class OracleDrafter(RecurrentDrafter):
    """Drafts by the real arithmetic, then overwrites the tokens.

    Slot 0 of every level becomes the verifier's own next token, which is known from an earlier run, with probability
    ``hit_rate`` at each place of the reply, independently; otherwise it is wrong, and so are all other slots, which
    hang beside slot 0. Log-probabilities say so: log p for each token of slot 0, and for a sibling its share of 1 - p
    spread over the draft vocabulary. So tokens per step are 1 + p + p^2 + ... up to the length drafted.
    """

    def __init__(self, config: RecurrentDraftingConfig, hit_rate: float) -> None:
        super().__init__(config)
        self.hit_rate = hit_rate
        self._known: dict[tuple[int, ...], list[int]] = {}
        self._state: GenerationState | None = None
        self._truth = torch.empty(0, 0, dtype=torch.int64)
        self._hits = torch.empty(0, 0, dtype=torch.bool)

    def learn(self, prompt: Tensor, reply: Sequence[int]) -> None:  # (S,), pads included
        """Remember the verifier's own reply to a prompt."""
        self._known[tuple(prompt.tolist())] = list(reply)

    def hits(self, prompt: Tensor, count: int) -> Tensor:  # (S,) -> (count,) bool
        """At which places of a reply the draft is right: a hash of prompt and place, the same at every hit rate."""
        seed = zlib.crc32(repr(prompt.tolist()).encode())
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < self.hit_rate

    def ranks(self, prompt: Tensor, count: int, length: int) -> Tensor:  # (S,) -> (R, L, L), R = count
        """How drafts after each token of a reply fare, as `DraftRanks` says: right up to the first miss."""
        after = functional.pad(self.hits(prompt, count), (0, length)).unfold(0, length, 1)[1:]  # (R, L)
        depths = torch.arange(1, length + 1)
        accepted = after.long().cumprod(1).bool()[:, None] & (depths <= depths[:, None])
        return torch.where(accepted, depths, REJECTED)

    def follow(self, state: GenerationState) -> None:
        """Draft for the replies of ``state`` from now on. Raises ValueError for a prompt whose reply is not known."""
        replies = [self._known.get(tuple(prompt.tolist())) for prompt in state.prompts]
        known = [reply for reply in replies if reply is not None]
        if len(known) < len(replies):
            raise ValueError("the oracle does not know the reply to this prompt: call learn first")
        longest = max(map(len, known))
        device = state.prompts.device
        self._truth = torch.tensor([reply + [0] * (longest - len(reply)) for reply in known], device=device)
        self._hits = torch.stack([self.hits(prompt, longest) for prompt in state.prompts]).to(device)
        self._state = state

    def overwrite(self, beams: Beams) -> Beams:
        """The oracle's own tokens, parents and log-probabilities in the place of real ones."""
        batch, length, width = beams.tokens.shape
        if self._state is None or batch != len(self._state.rows):
            return beams  # a draft outside of decoding, such as one that is timed
        device = beams.tokens.device
        rows = torch.tensor(self._state.rows, device=device)[:, None]
        places = torch.tensor(self._state.lengths, device=device)[:, None] + torch.arange(length, device=device)
        places = places.clamp_(max=self._truth.shape[1] - 1)
        truth = self._truth[rows, places]  # (B, L)
        wrong = (truth + 1) % self.config.vocab_size
        tokens = torch.where(beams.tokens == truth[:, :, None], wrong[:, :, None], beams.tokens)
        tokens[:, :, 0] = torch.where(self._hits[rows, places], truth, wrong)
        log_probs = self.log_probs(length, width).to(device).expand_as(beams.log_probs)
        return Beams(tokens, torch.zeros_like(beams.parents), log_probs)

    def log_probs(self, length: int, width: int) -> Tensor:  # (L, W)
        """What it claims of each level's beams."""
        others = max(self.config.draft_vocab_size - 1, 1)
        right = min(max(self.hit_rate, 1 / (others + 1)), 1 - 1 / (others + 1))  # 0 and 1 have no finite logarithm
        level = torch.arange(length)[:, None]
        ladder = (level * math.log(right) + math.log((1 - right) / others)).expand(-1, width).clone()
        ladder[:, 0] = (level[:, 0] + 1) * math.log(right)
        return ladder


class OracleDraft:
    """Searches as decoding does, and lets the oracle overwrite what was drafted."""

    def __init__(self, drafter: RecurrentDrafter, embed: Embed) -> None:
        if not isinstance(drafter, OracleDrafter):
            raise TypeError(f"an oracle's draft needs an OracleDrafter, not {type(drafter).__name__}")
        self.drafter, self._search = drafter, BeamDrafter(drafter, embed)

    def follow(self, state: GenerationState) -> None:
        """Tell the oracle which replies are being generated."""
        self.drafter.follow(state)

    def __call__(self, hidden: Tensor, root: Tensor, width: int, length: int, deeper: Deeper | None = None) -> Beams:
        claims = iter(self.drafter.log_probs(length, width).to(hidden.device))

        def claimed(log_probs: Tensor) -> bool:
            return deeper is None or deeper(next(claims).expand_as(log_probs))

        return self.drafter.overwrite(self._search(hidden, root, width, length, claimed))
