"""What to measure with: cells that vary one factor at a time, models, prompts, and a drafter that knows the replies."""

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.core.beam import Beams, Deeper
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.decoding.decode import BeamDrafter, Embed
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.tuning import REJECTED
from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2-small-shape": lambda: AutoConfig.for_model("gpt2"),
    "llama-160m-shape": lambda: AutoConfig.for_model(
        "llama",
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
        max_position_embeddings=2048,
    ),
}
WEIGHT_SCALE = 4.0  # of random matrices, beyond transformers' own: so that greedy output varies
DRAFT_VOCABULARY = 8192
DEMO = "demo"
FACTORS: dict[str, Sequence[Any]] = {"batch": (2, 4, 8, 16), "context": (64, 512, 896), "temperature": (0.7, 1.0)}
HIT_RATES = (0.0, 0.3, 0.6, 0.8, 0.95)


@dataclass(frozen=True)
class BenchCell:
    """One combination: every arm runs on the same prompts of exactly ``context`` tokens, ``batch`` at a time.

    ``hit_rate``: of an oracle drafter; None is the model's trained one.
    """

    name: str
    model: str
    dtype: str
    batch: int = 1
    context: int = 128
    temperature: float = 0.0
    hit_rate: float | None = None


def all_cells(models: Sequence[str], base_dtype: str) -> list[BenchCell]:
    """The grid: for the demo model its factors, for a shape every hit rate in both dtypes."""
    dtypes = sorted(("float32", "bfloat16"), key=lambda dtype: dtype != base_dtype)
    cells: list[BenchCell] = []
    for model in models:
        if model == DEMO:
            base = BenchCell(f"{DEMO}/base", DEMO, base_dtype)
            cells += [base, replace(base, name=f"{DEMO}/{dtypes[1]}", dtype=dtypes[1])]
            for factor, values in FACTORS.items():
                cells += [replace(base, name=f"{DEMO}/{factor}-{value:g}", **{factor: value}) for value in values]
        else:
            for dtype, rate in itertools.product(dtypes, HIT_RATES):
                cells.append(BenchCell(f"{model}/{dtype}/oracle-{rate:g}", model, dtype, hit_rate=rate))
    return cells


def selected(cells: Sequence[BenchCell], patterns: Sequence[str]) -> list[BenchCell]:
    """Those whose name one of the shell patterns matches. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise ValueError(f"no cell matches {pattern!r}, expected a name or pattern among those that --list shows")
    return [cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in patterns)]


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Random weights, the same every time, with which greedy output varies and never ends."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight is not embedding:
                weight.mul_(WEIGHT_SCALE)
    return model.to(device=device, dtype=dtype)


def oracle_for(model: PreTrainedModel, hit_rate: float) -> RecurrentDraftingSpeculator:
    """An oracle with the drafter that would suit the model: E = H, 2 layers; drafts 4 beams of 8 tokens."""
    verifier = Verifier(model)
    torch.manual_seed(0)
    config = RecurrentDraftingConfig(
        hidden_size=verifier.hidden_size,
        vocab_size=verifier.vocab_size,
        draft_vocab_size=min(DRAFT_VOCABULARY, verifier.vocab_size),
        beam_width=4,
        beam_length=8,
    )
    speculator = RecurrentDraftingSpeculator(OracleDrafter(config, hit_rate), lookup=False, drafting=OracleDraft)
    speculator.attach_verifier(model)
    return speculator


def demo_prompts(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[Tensor]:
    """``count`` prompts of exactly ``length`` tokens from held-out conversations of the demo data.

    Each ends as a conversation does before a reply; in front of it come others, the foremost cut to the length. There
    are as many different ends as conversations, about 300; beyond that fewer prompts are returned.
    """
    dialogues = load_dialogues("demo", None, "eval").dialogues
    whole = prompts_from_dialogues(dialogues, tokenizer, count=len(dialogues) - 1, max_length=1 << 20)
    return [behind_others(whole, number, length) for number in range(min(count, len(whole)))]


def behind_others(texts: Sequence[Tensor], number: int, length: int) -> Tensor:
    """The last ``length`` tokens of text ``number`` with as many of the texts after it in front as that takes.

    >>> texts = [torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6, 7])]
    >>> behind_others(texts, 0, 4).tolist()
    [4, 5, 1, 2]
    """
    text = texts[number]
    while len(text) < length:
        number = (number + 1) % len(texts)
        text = torch.cat([texts[number], text])
    return text[-length:]


def random_prompts(vocabulary: int, count: int, length: int) -> list[Tensor]:
    """Prompts of random tokens, the same every time: text means nothing to random weights."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(1, vocabulary, (count, length), generator=generator))


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
        self.drafter.follow(state)

    def __call__(self, hidden: Tensor, root: Tensor, width: int, length: int, deeper: Deeper | None = None) -> Beams:
        claims = iter(self.drafter.log_probs(length, width).to(hidden.device))

        def claimed(log_probs: Tensor) -> bool:
            return deeper is None or deeper(next(claims).expand_as(log_probs))

        return self.drafter.overwrite(self._search(hidden, root, width, length, claimed))
