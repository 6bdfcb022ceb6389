"""A drafter at work inside transformers' own ``generate``."""

import copy
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from recurrent_drafter.decoding import preconditions
from recurrent_drafter.decoding.costs import Tuning
from recurrent_drafter.decoding.decode import (
    BeamDrafter,
    Draft,
    DraftController,
    Drafting,
    Embed,
    FixedController,
    decode,
)
from recurrent_drafter.decoding.experience import Experience
from recurrent_drafter.decoding.generation_state import DecodeStats, GenerationState, as_tuple, bind_stop_strings
from recurrent_drafter.decoding.lookup import REMEMBERED, Memory
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.decoding.session import DecodingSession
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import check_pair, load_drafter
from recurrent_drafter.models.packed_linear import GradualPacking, PackedLinears, swapped
from recurrent_drafter.models.verifier import Verifier


class RecurrentDraftingSpeculator:
    """Speculation for a verifier, by a drafter, by lookup, or both: a decoding method for any stock causal LM.

    ``model.generate(**inputs, custom_generate=speculator)`` runs it inside transformers' own `generate`; `generate` and
    `stream` run it with a streamer, with stop strings, or as an iterator.

    Args:
        drafter: the trained drafter; without one, lookup alone.
        shape: how much to draft and verify at every step. By default that follows measured cost and acceptance, down
            to plain autoregression where speculation does not pay.
        lookup: whether what prompt and replies have said before is drafted as well. By default it is unless a shape is
            given, which then is the drafter's alone. Neither drafter nor lookup is plain autoregression.
        remembered: the newest so many tokens of earlier replies are looked in too; 0 takes each reply for itself.
        drafting: makes what drafts from the drafter and the verifier's embedding; by default a beam search.
        clock: seconds; what steps take by it decides how much is drafted.
    """

    def __init__(
        self,
        drafter: RecurrentDrafter | None = None,
        shape: DraftShape | None = None,
        *,
        lookup: bool | None = None,
        remembered: int = REMEMBERED,
        drafting: Callable[[RecurrentDrafter, Embed], Draft] = BeamDrafter,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.drafter = drafter
        self.shape = shape
        self.drafting = drafting
        self.clock = clock
        self._lookup = lookup
        self.remembered = remembered
        self.tuning: Tuning | None = None  # found beside the drafter
        self.stats = DecodeStats(steps=0, tokens=0)
        self._verifier: Verifier | None = None
        self.packed: list[PackedLinears] = []  # the layers that compute from packed weights while decoding
        self._draft: Draft | None = None
        self._experience: Experience | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecurrentDraftingSpeculator":
        """The drafter and its tuning; the copy attaches to the model that it is used with."""
        twin = type(self)(
            copy.deepcopy(self.drafter, memo),
            self.shape,
            lookup=self._lookup,
            remembered=self.remembered,
            drafting=self.drafting,
            clock=self.clock,
        )
        twin.tuning = self.tuning
        return twin

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        verifier: PreTrainedModel | None = None,
        shape: DraftShape | None = None,
        lookup: bool | None = None,
        remembered: int = REMEMBERED,
        **options: Any,
    ) -> "RecurrentDraftingSpeculator":
        """Load a drafter from a directory or the Hub, and attach it to ``verifier`` if one is given.

        ``shape``, ``lookup`` and ``remembered`` are the constructor's, ``options`` go to
        ``PreTrainedModel.from_pretrained``. Only safetensors are read. Raises OSError when nothing
        loadable lies there, ValueError when it is not a recurrent drafter or not one for this verifier.
        """
        speculator = cls(load_drafter(path, **options), shape, lookup=lookup, remembered=remembered)
        speculator.tuning = Tuning.from_folder(path)
        if verifier is not None:
            speculator.attach_verifier(verifier)
        return speculator

    def with_shape(self, shape: DraftShape | None) -> "RecurrentDraftingSpeculator":
        """The same drafter and verifier at another shape; packed weights and learned costs are shared."""
        other = copy.copy(self)
        other.shape = shape
        if self._experience is not None:
            other._experience = self._experience.afresh(self._experience.longest)
        return other

    def with_tuning(self, tuning: Tuning) -> "RecurrentDraftingSpeculator":
        """The same again, adapting to measured acceptance by these costs: nothing else is known yet."""
        other = self.with_shape(None)
        other.tuning = tuning
        other._experience = Experience.of(self.verifier, self.drafter, tuning, self.remembered, self.clock)
        return other

    def with_lookup(self, lookup: bool) -> "RecurrentDraftingSpeculator":
        """The same with lookup, or without."""
        other = self.with_shape(self.shape)
        other._lookup = lookup
        return other

    def without_memory(self) -> "RecurrentDraftingSpeculator":
        """The same, but each reply for itself: what is measured of one prompt then tells nothing of another."""
        other = self.with_shape(self.shape)
        other.remembered = 0
        if other._experience is not None:
            other._experience.memory = Memory(0)
        return other

    def without_drafter(self, *, lookup: bool = False) -> "RecurrentDraftingSpeculator":
        """Lookup alone, or plain autoregression in the same loop, on the same verifier."""
        other = self.with_shape(None).with_lookup(lookup)
        other.drafter, other._draft = None, None
        if self._experience is not None:
            other._experience = self._experience.afresh(longest=None)
        return other

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write the drafter's weights (safetensors) and config; a shape that was fixed becomes the saved one."""
        if self.drafter is None:
            raise ValueError("there is no drafter to save: this speculator decodes autoregressively")
        if self.shape is not None:
            self.drafter.config.update(dataclasses.asdict(self.shape))
        self.drafter.save_pretrained(path, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the drafter, as ``PreTrainedModel.push_to_hub`` does."""
        if self.drafter is None:
            raise ValueError("there is no drafter to upload: this speculator decodes autoregressively")
        return self.drafter.push_to_hub(repo_id, **options)  # type: ignore[arg-type]

    def attach_verifier(self, model: PreTrainedModel, *, packed: bool = True) -> None:
        """Join with a model, to whose device and dtype the drafter moves; a tuning is used where it holds.

        In float32 on a CPU the weights are packed here, which takes some seconds per gigabyte. A speculator that
        `model.generate` is given without this, or with ``packed`` false, packs bit by bit while it decodes.
        Raises ValueError when the drafter was made for another width or vocabulary.
        """
        self._attach(model)
        if packed and self.speculates:
            for linears in self.packed:
                linears.forwards()

    def _attach(self, model: PreTrainedModel) -> None:
        verifier = Verifier(model)
        if self.drafter is not None:
            check_pair(self.drafter.config, verifier.hidden_size, verifier.vocab_size)
            self.drafter.to(device=verifier.device, dtype=model.dtype).eval()  # type: ignore[arg-type, call-arg]
            self._draft = self.drafting(self.drafter, verifier.embed)
        self._verifier = verifier
        self.packed = [PackedLinears(module) for module in (model, self.drafter) if module is not None]
        self._experience = Experience.of(verifier, self.drafter, self.tuning, self.remembered, self.clock)

    def session(self) -> DecodingSession:
        """For one conversation: given to every `generate` or `stream` of it, no turn reads again what one has read."""
        return DecodingSession()

    @property
    def verifier(self) -> Verifier:
        """The attached verifier. Raises ValueError when there is none."""
        if self._verifier is None:
            raise ValueError("no verifier is attached: call attach_verifier(model) first")
        return self._verifier

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        row_ids: Sequence[int] | None = None,
        session: DecodingSession | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Transformers' hook for custom decoding: prompts (B, S) to prompts with replies (B, S + new).

        When sampling, the noise depends on ``seed`` (by default drawn from torch's global generator), the sequence's id
        (``row_ids``, by default 0 .. B - 1) and the position in its reply: the same give the same tokens, with a
        drafter or without, alone or in a batch. What a ``session`` has read of its one prompt is not read again.
        """
        config = generation_config or model.generation_config
        state = GenerationState.from_hf(input_ids, stopping_criteria, config)
        sampler = Sampler.from_hf(state, logits_processor, config, seed, row_ids)
        if streamer is not None:
            if len(input_ids) > 1:
                raise ValueError(f"a streamer follows one sequence, and the batch has {len(input_ids)}")
            streamer.put(input_ids.cpu())
        for emitted in self._steps(model, config, state, sampler, model_kwargs, session):
            if streamer is not None:
                streamer.put(torch.tensor(emitted[0]))
        if streamer is not None:
            streamer.end()
        end_ids = as_tuple(config.eos_token_id)
        sequences = state.sequences(config.pad_token_id if config.pad_token_id is not None else (*end_ids, 0)[0])
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        streamer: BaseStreamer | None = None,
        seed: int | None = None,
        row_ids: Sequence[int] | None = None,
        session: DecodingSession | None = None,
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """As ``model.generate`` on the attached verifier, with all of its options.

        ``streamer``, and ``stop_strings`` with their ``tokenizer``, work here: inside ``custom_generate`` transformers
        drops them. With a ``session`` (see `session`) a turn of one conversation costs what is new in its prompt.
        """
        method = partial(self, streamer=streamer, seed=seed, row_ids=row_ids, session=session)
        return self._through_hf(method, input_ids, attention_mask, options, session)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        end_ids: Sequence[int] | None = None,
        seed: int | None = None,
        session: DecodingSession | None = None,
        **options: Any,
    ) -> Generator[list[int]]:
        """The reply to one prompt (1, S) as an iterator over the tokens of each step.

        Takes the options of ``model.generate``; ``end_ids``, if given, are the tokens that end the reply, and none
        does if it is empty. With a ``session`` (see `session`) what it has read of the prompt is not read again.
        """
        if len(input_ids) != 1:
            raise ValueError(f"a batch of {len(input_ids)} prompts cannot be streamed: expected one")

        def method(model: PreTrainedModel, input_ids: Tensor, **prepared: Any) -> Iterator[list[list[int]]]:
            if len(input_ids) != 1:
                raise ValueError(f"{len(input_ids)} sequences cannot be streamed: expected num_return_sequences=1")
            config = prepared.pop("generation_config")
            state = GenerationState.from_hf(input_ids, prepared.pop("stopping_criteria"), config)
            if end_ids is not None:
                state.end_ids = frozenset(end_ids)
            sampler = Sampler.from_hf(state, prepared.pop("logits_processor"), config, seed, None)
            return self._steps(model, config, state, sampler, prepared, session)

        return (emitted[0] for emitted in self._through_hf(method, input_ids, attention_mask, options, session))

    def _through_hf(
        self,
        method: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        options: dict[str, Any],
        session: DecodingSession | None,
    ) -> Any:
        """Let transformers prepare inputs, processors and criteria, and call ``method`` with them."""
        preconditions.check_ids(input_ids, attention_mask)
        if session is not None and attention_mask is None:  # transformers would take tokens in the text for pads
            attention_mask = torch.ones_like(input_ids)
        if options.get("assistant_model") is not None:
            raise ValueError("not supported when decoding with a drafter: assistant_model")
        bind_stop_strings(options)
        generate: Callable[..., Any] = self.verifier.model.generate  # type: ignore[assignment]
        return generate(input_ids=input_ids, attention_mask=attention_mask, custom_generate=method, **options)

    def _steps(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        state: GenerationState,
        sampler: Sampler,
        arguments: dict[str, Any],
        session: DecodingSession | None,
    ) -> Iterator[list[list[int]]]:
        """Check everything, then decode; between steps the model is as it was."""
        if self._verifier is None or not self._verifier.is_of(model):
            self._attach(model)
        verifier, mask = self.verifier, arguments.get("attention_mask")
        preconditions.check(verifier, config, state, sampler, arguments)
        if session is not None:
            preconditions.check_conversation(state.prompts, mask)
        if self.drafter is not None and self._draft is not None:
            preconditions.check_drafter(self.drafter, self.shape, verifier, state.prompts.shape[1])
            self._draft.follow(state)
        temperature = float(config.temperature or 1.0) if config.do_sample else 0.0
        lookup = self.experience.lookup(state, temperature) if self.lookup else None
        drafting = Drafting(self.controller(temperature), self._draft, lookup)
        # For one row a copy would gain nothing over the weights as they are.
        packing = GradualPacking(self.packed if self.speculates or len(state.prompts) > 1 else ())
        steps = decode(verifier, drafting, state, sampler, mask, session)
        try:
            while True:
                with torch.inference_mode(), swapped(packing.forwards):  # a step's alone: the rest is the consumer's
                    emitted = next(steps, None)
                if emitted is None:
                    return
                self.stats = state.stats
                yield emitted
                packing.go_on()
                if session is not None and not state.done:
                    session.check(state)
        finally:  # the consumer may have had enough
            if lookup is not None:
                lookup.close()
            self.experience.save()

    @property
    def lookup(self) -> bool:
        """Whether what was said before is drafted."""
        return self.shape is None if self._lookup is None else self._lookup

    @property
    def speculates(self) -> bool:
        """Whether anything is drafted; otherwise decoding is plain autoregression."""
        return self.drafter is not None or self.lookup

    def controller(self, temperature: float) -> DraftController:
        """What decides how much to draft, one for each temperature, for acceptance depends on it (0 is greedy)."""
        if self.shape is not None or not self.speculates:
            return FixedController(self.shape)
        return self.experience.controller(temperature)

    @property
    def experience(self) -> Experience:
        """What has been learned of the attached verifier. Raises ValueError when there is none."""
        assert self.verifier is not None
        assert self._experience is not None
        return self._experience
