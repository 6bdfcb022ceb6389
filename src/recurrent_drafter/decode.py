"""The loop of the paper: draft, verify, follow the tree (layer 3)."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from recurrent_drafter.accept import Accepted, follow_tree
from recurrent_drafter.beam import Beams, beam_search
from recurrent_drafter.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.packing import PackedLinears
from recurrent_drafter.tree import prefix_tree, root_tree
from recurrent_drafter.verifier import Verifier


def draft_beams(
    drafter: RecurrentDrafter,
    embed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    root: Tensor,
    width: int,
    length: int,
) -> Beams:
    """Beam search from hidden states (B, H) and root tokens (B,), through the drafter's own step."""
    context = drafter.context(hidden)[:, None]  # (B, 1, E)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        logits, state = drafter.step(embed(tokens), state, context)
        return logits.float().log_softmax(-1), state

    return beam_search(step, root, torch.zeros_like(hidden)[:, None], drafter.draft_ids, width, length)


def greedy(logits: Tensor) -> Callable[[Tensor], Tensor]:  # (B, N, V)
    """Draws the verifier's most probable token at nodes (B,)."""
    best = logits.argmax(-1)  # (B, N)
    return lambda nodes: best.gather(1, nodes[:, None])[:, 0]


def decode(
    verifier: Verifier,
    drafter: RecurrentDrafter | None,
    shape: DraftShape,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    stop: "Stop",
    draws: Callable[[Tensor], Callable[[Tensor], Tensor]] = greedy,
) -> Iterator[list[list[int]]]:
    """Generate from prompts (B, S) until ``stop`` says so; yields each row's new tokens after every verification.

    Without a drafter every step verifies the root alone, which is plain autoregression.
    """
    session, read = verifier.open(input_ids, attention_mask, input_ids.shape[1] + stop.max_new_tokens + shape.nodes)
    root, hidden = draws(read.logits)(torch.zeros_like(input_ids[:, 0])), read.hiddens[:, -1]
    yield stop.emit(root[:, None].tolist(), [0] * len(root))
    while not stop.done:
        length = min(shape.beam_length, stop.remaining - 1)  # the bonus token comes on top
        if drafter is None or length < 1:
            tree = root_tree(root)
        else:
            beams = draft_beams(drafter, verifier.embed, hidden, root, shape.beam_width, length)
            tree = prefix_tree(root, beams, shape.nodes)
        verified = session.forward_tree(tree)
        accepted = follow_tree(tree, draws(verified.logits))
        n_accepted = accepted.n_accepted.tolist()  # the one synchronisation of a step
        session.keep(accepted.path, n_accepted)
        root, hidden = accepted.bonus_token, hidden_after(accepted, verified.hiddens)
        yield stop.emit(accepted.tokens.tolist(), n_accepted)


def hidden_after(accepted: Accepted, hiddens: Tensor) -> Tensor:  # (B, N, H) -> (B, H)
    """The hidden state of each row's last accepted node, from which its bonus token was drawn."""
    rows = torch.arange(hiddens.shape[0], device=hiddens.device)
    return hiddens[rows, accepted.path[:, -1]]


@dataclass
class Stop:
    """When each row of a batch ends; counts the tokens and the steps that it took."""

    batch: int
    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()
    criteria: Callable[[int, list[int]], bool] | None = None
    generated: list[list[int]] = field(init=False)
    finished: list[bool] = field(init=False)
    steps: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.generated = [[] for _ in range(self.batch)]
        self.finished = [False] * self.batch
        self.steps = [-1] * self.batch  # prefill's own pass is not counted

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(self.finished)

    @property
    def remaining(self) -> int:
        """The most tokens that any unfinished row may still emit."""
        shortest = min(len(row) for row, ended in zip(self.generated, self.finished, strict=True) if not ended)
        return self.max_new_tokens - shortest

    def emit(self, tokens: Sequence[Sequence[int]], n_accepted: Sequence[int]) -> list[list[int]]:
        """The tokens that count: up to an end token, the length limit or a criterion; none for a row that has ended."""
        return [self._emit_row(row, tokens[row][: n_accepted[row] + 1]) for row in range(self.batch)]

    def _emit_row(self, row: int, tokens: Sequence[int]) -> list[int]:
        if self.finished[row]:
            return []
        text = self.generated[row]
        before = len(text)
        self.steps[row] += 1
        for token in tokens:
            text.append(token)
            if (
                token in self.end_ids
                or len(text) == self.max_new_tokens
                or (self.criteria is not None and self.criteria(row, text))
            ):
                self.finished[row] = True
                break
        return text[before:]


@dataclass(frozen=True)
class DecodeStats:
    """What a generation took: steps after prefill, and the tokens emitted in them, summed over the rows."""

    steps: int
    tokens: int

    @property
    def tokens_per_step(self) -> float:
        """Tokens per verification; NaN when prefill's token was the only one."""
        return self.tokens / self.steps if self.steps else float("nan")


class RecurrentDraftingSpeculator:
    """A drafter at work for a verifier: a decoding method for any stock causal LM.

    ``model.generate(**inputs, custom_generate=speculator)`` runs it behind transformers' own `generate`;
    `generate` and `stream` run it with a streamer or as an iterator.

    Args:
        drafter: the trained drafter; None decodes by plain autoregression in the same loop.
        shape: how much to draft; by default the shape saved with the drafter.
    """

    def __init__(self, drafter: RecurrentDrafter | None, shape: DraftShape | None = None) -> None:
        self.drafter = drafter
        self.shape = shape or (drafter.config.draft_shape if drafter is not None else DraftShape())
        self.stats = DecodeStats(steps=0, tokens=0)
        self._verifier: Verifier | None = None
        self._packed: list[PackedLinears] = []

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        verifier: PreTrainedModel | None = None,
        shape: DraftShape | None = None,
        **options: Any,
    ) -> "RecurrentDraftingSpeculator":
        """Load a drafter from a directory or the Hub, and attach it to ``verifier`` if one is given.

        ``options`` go to ``PreTrainedModel.from_pretrained``. Only safetensors are read. Raises OSError when nothing
        loadable lies there, ValueError when it is not a recurrent drafter or not one for this verifier.
        """
        drafter = load_drafter(path, **options)
        speculator = cls(drafter, shape)
        if verifier is not None:
            speculator.attach_verifier(verifier)
        return speculator

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write the drafter's weights (safetensors) and config, the draft shape included."""
        if self.drafter is None:
            raise ValueError("there is no drafter to save: this speculator decodes autoregressively")
        shape = self.shape
        self.drafter.config.update(
            {"beam_width": shape.beam_width, "beam_length": shape.beam_length, "max_tree_nodes": shape.max_tree_nodes}
        )
        self.drafter.save_pretrained(path, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the drafter, as ``PreTrainedModel.push_to_hub`` does."""
        if self.drafter is None:
            raise ValueError("there is no drafter to upload: this speculator decodes autoregressively")
        return self.drafter.push_to_hub(repo_id, **options)  # type: ignore[arg-type]

    def attach_verifier(self, model: PreTrainedModel) -> None:
        """Join with a model. Raises ValueError when the drafter was made for another width or vocabulary."""
        verifier = Verifier(model)
        if self.drafter is not None:
            check_pair(self.drafter.config, verifier)
            self.drafter.to(device=verifier.device, dtype=model.dtype).eval()  # type: ignore[arg-type, call-arg]
        self._verifier = verifier
        self._packed = [PackedLinears(module) for module in (model, self.drafter) if module is not None]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Transformers' hook for custom decoding: prompts (B, S) to prompts with replies (B, S + new)."""
        config = generation_config or model.generation_config
        refuse_unsupported(config, logits_processor, model_kwargs)
        end_ids = as_tuple(config.eos_token_id)
        mask = model_kwargs.get("attention_mask")
        stop = stop_from(input_ids, stopping_criteria, config, end_ids)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for emitted in self._run(model, input_ids, mask, stop):
            if streamer is not None:
                streamer.put(torch.tensor(emitted[0]))
        if streamer is not None:
            streamer.end()
        pad = config.pad_token_id if config.pad_token_id is not None else (end_ids[0] if end_ids else 0)
        longest = max(map(len, stop.generated))
        replies = [row + [pad] * (longest - len(row)) for row in stop.generated]
        return torch.cat([input_ids, torch.tensor(replies, device=input_ids.device)], dim=1)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """As ``model.generate`` on the attached verifier; ``streamer`` works as in transformers."""
        streamer = options.pop("streamer", None)
        model = self.verifier.model

        def method(model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Tensor:
            return self(model, input_ids, streamer=streamer, **arguments)

        generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
        return generate(input_ids=input_ids, attention_mask=attention_mask, custom_generate=method, **options)

    def stream(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        end_ids: Sequence[int] | None = None,
    ) -> Generator[list[int]]:
        """Greedy reply to one prompt (1, S), yielded as the tokens of each step; ``end_ids`` default to the model's."""
        verifier = self.verifier
        if end_ids is None:
            end_ids = as_tuple(verifier.model.generation_config.eos_token_id)
        stop = Stop(len(input_ids), max_new_tokens, frozenset(end_ids))
        for emitted in self._run(verifier.model, input_ids, None, stop):
            yield emitted[0]

    @property
    def verifier(self) -> Verifier:
        """The attached verifier. Raises ValueError when there is none."""
        if self._verifier is None:
            raise ValueError("no verifier is attached: call attach_verifier(model) first")
        return self._verifier

    def _run(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, stop: Stop
    ) -> Iterator[list[list[int]]]:
        if self._verifier is None or self._verifier.model is not model:
            self.attach_verifier(model)
        verifier = self.verifier
        check_prompt(input_ids, stop.max_new_tokens, verifier.context_length)
        with ExitStack() as stack:
            for packed in self._packed:
                stack.enter_context(packed.applied())
            stack.enter_context(torch.inference_mode())
            for emitted in decode(verifier, self.drafter, self.shape, input_ids, attention_mask, stop):
                self.stats = DecodeStats(sum(stop.steps), sum(map(len, stop.generated)) - stop.batch)
                yield emitted


def load_drafter(path: str | Path, **options: Any) -> RecurrentDrafter:
    """A drafter from a directory or the Hub; only safetensors are read. Raises OSError or ValueError, in one line."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise OSError(f"{path} holds no config.json: expected the directory of a trained drafter")
    found = PreTrainedConfig.get_config_dict(path, **options)[0].get("model_type")
    if found != RecurrentDraftingConfig.model_type:
        raise ValueError(f"{path} holds a model of type {found!r}, expected {RecurrentDraftingConfig.model_type!r}")
    return RecurrentDrafter.from_pretrained(path, use_safetensors=True, **options)


def check_pair(config: RecurrentDraftingConfig, verifier: Verifier) -> None:
    """Raise ValueError unless the drafter was made for a verifier of this width and vocabulary."""
    for name, own, found in (
        ("width", config.hidden_size, verifier.hidden_size),
        ("vocabulary", config.vocab_size, verifier.vocab_size),
    ):
        if own != found:
            made_for = f" ({config.verifier_name_or_path})" if config.verifier_name_or_path else ""
            raise ValueError(
                f"the drafter is for a verifier of {name} {own:,}{made_for}, and this verifier's {name} is {found:,}: "
                "use the drafter with the model that it was trained for, or train one for this model"
            )


def check_prompt(input_ids: Tensor, max_new_tokens: int, context_length: int | None) -> None:
    """Raise ValueError for prompts that are empty or do not leave room for the reply."""
    batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise ValueError("the prompt is empty: expected at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if context_length is not None and length + max_new_tokens > context_length:
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones exceed the context of {context_length}: "
            f"shorten the prompt, or ask for at most {max(context_length - length, 0)} new tokens"
        )


def refuse_unsupported(
    config: GenerationConfig, processors: LogitsProcessorList | None, model_kwargs: dict[str, Any]
) -> None:
    """Raise ValueError, by name, for generation options that this loop does not implement."""
    refused = {
        "do_sample=True": bool(config.do_sample),
        f"num_beams={config.num_beams}": (config.num_beams or 1) > 1,
        f"num_return_sequences={config.num_return_sequences}": (config.num_return_sequences or 1) > 1,
        "return_dict_in_generate=True": bool(config.return_dict_in_generate),
        "past_key_values": _has_content(model_kwargs.get("past_key_values")),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        **{f"the logits processor {type(processor).__name__}": True for processor in processors or ()},
    }
    names = [name for name, present in refused.items() if present]
    if names:
        raise ValueError(f"not supported when decoding with a drafter: {', '.join(names)} (greedy decoding only)")


def _has_content(cache: Any) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids as transformers gives them: none, one or several."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def stop_from(
    input_ids: Tensor, criteria: StoppingCriteriaList | None, config: GenerationConfig, end_ids: tuple[int, ...]
) -> Stop:
    """Transformers' stopping criteria: length and end token as `Stop` has them, any other asked token by token."""
    batch, length = input_ids.shape
    max_length = config.max_length
    others: list[StoppingCriteria] = []
    for criterion in criteria or ():
        if isinstance(criterion, MaxLengthCriteria):
            max_length = criterion.max_length
        elif not isinstance(criterion, EosTokenCriteria):
            others.append(criterion)
    if max_length is None:
        raise ValueError("neither max_new_tokens nor max_length is given: expected a limit on the reply")

    def ask(row: int, generated: list[int]) -> bool:
        text = torch.cat([input_ids[row], input_ids.new_tensor(generated)])[None]
        return any(bool(criterion(text, None).any()) for criterion in others)

    return Stop(batch, max_length - length, frozenset(end_ids), ask if others else None)
