"""A drafter at work behind transformers' own ``generate``."""

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from recurrent_drafter.decoding.costs import TUNING_FILE, Costs, Tuning, measure_costs
from recurrent_drafter.decoding.decode import BeamDrafter, Draft, FixedPace, Pace, decode
from recurrent_drafter.decoding.draft_controller import LONGEST, AutoPace
from recurrent_drafter.decoding.generation_state import Stop, as_tuple
from recurrent_drafter.decoding.preconditions import check_ids, check_padding, check_prompt, refuse_unsupported
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import check_pair, load_drafter
from recurrent_drafter.models.packed_linear import PackedLinears, swapped
from recurrent_drafter.models.verifier import Verifier

logger = logging.getLogger(__name__)
QUICK_ROWS = (1, 4, 12, 24, 64, 128)  # timed before the first reply, which waits for it: as many as may be verified


@dataclass(frozen=True)
class DecodeStats:
    """What a generation took: steps after prefill, and the tokens emitted in them, summed over the rows.

    ``drafts`` has an entry for each row: of every step, how many tokens deep the draft was and how many were accepted.
    """

    steps: int
    tokens: int
    drafts: Sequence[Sequence[tuple[int, int]]] = ()

    @property
    def tokens_per_step(self) -> float:
        """Tokens per verification; NaN when prefill's token was the only one."""
        return self.tokens / self.steps if self.steps else float("nan")


class RecurrentDraftingSpeculator:
    """A drafter at work for a verifier: a decoding method for any stock causal LM.

    ``model.generate(**inputs, custom_generate=speculator)`` runs it behind transformers' own `generate`; `generate` and
    `stream` run it with a streamer, with stop strings, or as an iterator.

    Args:
        drafter: the trained drafter; None decodes by plain autoregression in the same loop.
        shape: how much to draft and verify at every step. By default that follows measured cost and acceptance, down
            to plain autoregression where speculation does not pay.
    """

    def __init__(self, drafter: RecurrentDrafter | None, shape: DraftShape | None = None) -> None:
        self.drafter = drafter
        self.shape = shape
        self.costs: Costs | None = None
        self.tuning: Tuning | None = None  # found beside the drafter
        self._tuned_shape: DraftShape | None = None  # its shape, where it holds
        self.stats = DecodeStats(steps=0, tokens=0)
        self._verifier: Verifier | None = None
        self._packed: list[PackedLinears] = []
        self._draft: Draft | None = None
        self._paces: dict[float, AutoPace] = {}  # by temperature, for acceptance depends on it

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecurrentDraftingSpeculator":
        """The drafter and what was measured; the copy attaches to the model that it is used with."""
        twin = type(self)(copy.deepcopy(self.drafter, memo), self.shape)
        twin.costs, twin.tuning, twin._tuned_shape = self.costs, self.tuning, self._tuned_shape
        return twin

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
        speculator = cls(load_drafter(path, **options), shape)
        speculator.tuning = Tuning.from_folder(path)
        if verifier is not None:
            speculator.attach_verifier(verifier)
        return speculator

    def save_pretrained(self, path: str | Path, **options: Any) -> None:
        """Write the drafter's weights (safetensors) and config; a shape that was fixed becomes the saved one."""
        if self.drafter is None:
            raise ValueError("there is no drafter to save: this speculator decodes autoregressively")
        if (shape := self.shape) is not None:
            self.drafter.config.update(
                {
                    "beam_width": shape.beam_width,
                    "beam_length": shape.beam_length,
                    "max_tree_nodes": shape.max_tree_nodes,
                }
            )
        self.drafter.save_pretrained(path, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the drafter, as ``PreTrainedModel.push_to_hub`` does."""
        if self.drafter is None:
            raise ValueError("there is no drafter to upload: this speculator decodes autoregressively")
        return self.drafter.push_to_hub(repo_id, **options)  # type: ignore[arg-type]

    def attach_verifier(self, model: PreTrainedModel) -> None:
        """Join with a model, to whose device and dtype the drafter moves.

        Raises ValueError when the drafter was made for another width or vocabulary.
        """
        verifier = Verifier(model)
        if self.drafter is not None:
            check_pair(self.drafter.config, verifier.hidden_size, verifier.vocab_size)
            self.drafter.to(device=verifier.device, dtype=model.dtype).eval()  # type: ignore[arg-type, call-arg]
            self._draft = self._drafting(self.drafter, verifier)
        self._verifier = verifier
        self._take_tuning(model)
        self._packed = [PackedLinears(module) for module in (model, self.drafter) if module is not None]
        self._paces = {}

    def _drafting(self, drafter: RecurrentDrafter, verifier: Verifier) -> Draft:
        """How drafts are made: the one seam for another way of drafting."""
        return BeamDrafter(drafter, verifier.embed)

    def _take_tuning(self, model: PreTrainedModel) -> None:
        """Use what was tuned if it was on this hardware, dtype and architecture; otherwise costs are measured anew."""
        if self.tuning is None:
            return
        reason = self.tuning.mismatch(model)
        self.costs, self._tuned_shape = (self.tuning.costs, self.tuning.shape) if reason is None else (None, None)
        if reason is not None:
            logger.info("%s is not used: %s", TUNING_FILE, reason)

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
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Transformers' hook for custom decoding: prompts (B, S) to prompts with replies (B, S + new).

        When sampling, the noise depends on ``seed`` (by default drawn from torch's global generator), the sequence's id
        (``row_ids``, by default 0 .. B - 1) and the position in its reply: the same give the same tokens, with a
        drafter or without, alone or in a batch.
        """
        config = generation_config or model.generation_config
        stop = Stop.from_hf(input_ids, stopping_criteria, config)
        sampler = Sampler.from_hf(stop, logits_processor, config, seed, row_ids)
        if streamer is not None:
            if len(input_ids) > 1:
                raise ValueError(f"a streamer follows one sequence, and the batch has {len(input_ids)}")
            streamer.put(input_ids.cpu())
        for emitted in self._steps(model, config, stop, sampler, model_kwargs):
            if streamer is not None:
                streamer.put(torch.tensor(emitted[0]))
        if streamer is not None:
            streamer.end()
        end_ids = as_tuple(config.eos_token_id)
        pad = config.pad_token_id if config.pad_token_id is not None else (end_ids[0] if end_ids else 0)
        longest = max(map(len, stop.generated))
        replies = [row + [pad] * (longest - len(row)) for row in stop.generated]
        sequences = torch.cat([input_ids, torch.tensor(replies, device=input_ids.device)], dim=1)
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
        **options: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """As ``model.generate`` on the attached verifier, with all of its options.

        ``streamer``, and ``stop_strings`` with their ``tokenizer``, work here: behind ``custom_generate`` transformers
        drops them.
        """

        def method(model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Tensor | GenerateDecoderOnlyOutput:
            return self(model, input_ids, streamer=streamer, seed=seed, row_ids=row_ids, **arguments)

        return self._through_hf(method, input_ids, attention_mask, options)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        end_ids: Sequence[int] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Generator[list[int]]:
        """The reply to one prompt (1, S) as an iterator over the tokens of each step.

        Takes the options of ``model.generate``; ``end_ids``, if given, are the tokens that end the reply, and none
        does if it is empty.
        """
        if len(input_ids) != 1:
            raise ValueError(f"a batch of {len(input_ids)} prompts cannot be streamed: expected one")

        def method(
            model: PreTrainedModel,
            input_ids: Tensor,
            generation_config: GenerationConfig,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            **model_kwargs: Any,
        ) -> Iterator[list[list[int]]]:
            if len(input_ids) != 1:
                raise ValueError(f"{len(input_ids)} sequences cannot be streamed: expected num_return_sequences=1")
            stop = Stop.from_hf(input_ids, stopping_criteria, generation_config)
            if end_ids is not None:
                stop.end_ids = frozenset(end_ids)
            sampler = Sampler.from_hf(stop, logits_processor, generation_config, seed, None)
            return self._steps(model, generation_config, stop, sampler, model_kwargs)

        return (emitted[0] for emitted in self._through_hf(method, input_ids, attention_mask, options))

    def _through_hf(
        self, method: Any, input_ids: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
    ) -> Any:
        """Let transformers prepare inputs, processors and criteria, and call ``method`` with them."""
        check_ids(input_ids, attention_mask)
        if options.get("assistant_model") is not None:
            raise ValueError("not supported when decoding with a drafter: assistant_model")
        tokenizer, stop_strings = options.pop("tokenizer", None), options.pop("stop_strings", None)
        config = options.get("generation_config")
        if config is not None and config.stop_strings is not None:
            stop_strings = stop_strings or config.stop_strings
            options["generation_config"] = config = copy.deepcopy(config)
            config.stop_strings = None
        if stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer: pass tokenizer=...")
            criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or ())
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
            options["stopping_criteria"] = criteria
        generate: Callable[..., Any] = self.verifier.model.generate  # type: ignore[assignment]
        return generate(input_ids=input_ids, attention_mask=attention_mask, custom_generate=method, **options)

    def _steps(
        self, model: PreTrainedModel, config: GenerationConfig, stop: Stop, sampler: Sampler, arguments: dict[str, Any]
    ) -> Iterator[list[list[int]]]:
        """Check everything, then decode; between steps the model is as it was."""
        if self._verifier is None or not self._verifier.is_of(model):
            self.attach_verifier(model)
        verifier = self.verifier
        refuse_unsupported(config, sampler, arguments)
        check_prompt(stop, verifier.context_length)
        check_padding(stop.prompts, arguments.get("attention_mask"), arguments.get("position_ids"))
        self._check_drafter(verifier, stop)
        packed = [pair for linears in self._packed for pair in linears.forwards()]
        with torch.inference_mode(), swapped(packed):
            pace = self._pace(config, stop)
        mask = arguments.get("attention_mask")
        steps = decode(verifier, self._draft, pace, stop.prompts, mask, stop, sampler)
        while True:
            with torch.inference_mode(), swapped(packed):  # step by step: what a consumer does between is its own
                emitted = next(steps, None)
            if emitted is None:
                return
            emitted_after_prefill = sum(map(len, stop.generated)) - len(stop.generated)
            self.stats = DecodeStats(sum(stop.steps), emitted_after_prefill, stop.drafts)
            yield emitted

    def _check_drafter(self, verifier: Verifier, stop: Stop) -> None:
        """Raise ValueError when the drafter was moved away from the verifier, or the shape does not fit."""
        if self.drafter is None:
            return
        weight = next(self.drafter.parameters())
        if (weight.device, weight.dtype) != (verifier.device, verifier.model.dtype):
            raise ValueError(
                f"the drafter is {weight.dtype} on {weight.device}, the verifier {verifier.model.dtype} on "
                f"{verifier.device}: expected the same; attach_verifier(model) moves the drafter"
            )
        if self.shape is None:
            return
        if self.shape.beam_width > (most := self.drafter.config.draft_vocab_size):
            raise ValueError(f"beam_width is {self.shape.beam_width}, expected 1 to {most} (the draft vocabulary)")
        if verifier.context_length is not None:
            left = verifier.context_length - stop.prompts.shape[1]
            if self.shape.beam_length >= left:
                raise ValueError(
                    f"beam_length is {self.shape.beam_length}, expected at most {left - 1}: the prompt leaves {left} "
                    f"tokens of the context of {verifier.context_length}"
                )

    def _pace(self, config: GenerationConfig, stop: Stop) -> Pace:
        if self.drafter is None or self._draft is None or self.shape is not None:
            return FixedPace(self.shape if self.drafter is not None else None)
        temperature = float(config.temperature or 1.0) if config.do_sample else 0.0
        if temperature not in self._paces:
            saved = self._tuned_shape or self.drafter.config.draft_shape
            if self.costs is None:
                batch, context = stop.prompts.shape
                rows = [count for count in QUICK_ROWS if count <= max(24, 8 * batch)]
                self.costs = measure_costs(
                    self.verifier, self._draft, context, rows=rows, widths=(saved.beam_width,), repeats=2
                )
            self._paces[temperature] = AutoPace(self.costs, DraftShape(saved.beam_width, LONGEST))
        return self._paces[temperature]
