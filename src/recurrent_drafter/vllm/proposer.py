"""The proposer: drafts for vLLM's batch with the package's own drafter and beam search.

vLLM (0.32) verifies one chain per request, so the best beam is what it is given. Its model runner has all that a draft
starts from at one place, `propose_draft_token_ids`: each request's newest token, which is the root, and the hidden
state that it was drawn from. That function is wrapped here, in the worker, when a recurrent drafter is loaded.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from recurrent_drafter.core.beam import sampled_chain
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.decoding.draft_controller import ChainController
from recurrent_drafter.models.loading import load_drafter
from recurrent_drafter.vllm import compatibility, cpu_fixes
from recurrent_drafter.vllm.options import ServingOptions

RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


class RecurrentDraftProposer:
    """What vLLM makes from ``method: custom_class``; see `recurrent_drafter.vllm.plugin` for how it gets there."""

    def __init__(self, vllm_config: Any) -> None:
        compatibility.check()
        cpu_fixes.apply()
        compatibility.wrap(f"{RUNNER}.propose_draft_token_ids", propose_draft_token_ids)
        compatibility.wrap(f"{RUNNER}._get_spec_decode_draft_probs", draft_probabilities)
        self.options = ServingOptions.parse(vllm_config.additional_config)
        self.length = vllm_config.speculative_config.num_speculative_tokens
        self.dtype, self.device = vllm_config.model_config.dtype, vllm_config.device_config.device
        # Processes that share a verifier embed tokens together, so they must decide alike: no clock among them.
        sheds = self.options.shed and vllm_config.parallel_config.tensor_parallel_size == 1
        self.controller = ChainController(self.length) if sheds else None
        self.laws = DraftLaws(vllm_config.model_config.get_vocab_size())

    def load_model(self, target_model: Any) -> None:
        """Load the drafter beside the verifier, whose embedding it reads tokens with."""
        options = {"revision": self.options.revision} if self.options.revision else {}
        drafter = load_drafter(self.options.speculator, dtype=self.dtype, **options)
        self.drafter = drafter.to(self.device).eval()  # type: ignore[arg-type]
        self.search = BeamDrafter(self.drafter, target_model.embed_input_ids)
        self.width = self.options.beam_width or drafter.config.draft_shape.beam_width

    def propose(self, *_: Any, **__: Any) -> list[list[int]]:
        """Part of vLLM's interface, which gives no hidden states."""
        raise RuntimeError("a recurrent drafter drafts from hidden states: propose_draft_token_ids is not wrapped")

    def planned_length(self, scheduler_output: Any, drafted: Sequence[int], sampled: Sequence[Sequence[int]]) -> int:
        """How long the next drafts are to be: as vLLM schedules them, and as far as that pays."""
        length = min(self.length, scheduler_output.num_spec_tokens_to_schedule or self.length)
        rows = [row for row, tokens in enumerate(sampled) if tokens]
        if self.controller is None or not rows:
            return length
        verified = sum(drafted) + len(drafted)
        alone = len(rows) == len(drafted) and scheduler_output.total_num_scheduled_tokens == verified
        pays = self.controller.plan([drafted[row] for row in rows], [len(sampled[row]) for row in rows], alone=alone)
        return min(length, pays)

    def drafts(
        self,
        runner: Any,
        states: Tensor,
        metadata: Any,
        drafted: Sequence[int],
        sampled: Sequence[Sequence[int]],
        length: int,
    ) -> list[list[int]]:  # states (tokens verified, H)
        """A chain of so many tokens for every row that got a token; none for the others.

        Each row had ``drafted`` tokens verified and got those of ``sampled``. Laws of what was drawn are remembered.
        """
        chains: list[list[int]] = [[] for _ in sampled]
        rows = [row for row, tokens in enumerate(sampled) if tokens]
        if rows and length:
            hidden = states[states_of(rows, drafted, sampled)]
            roots = torch.tensor([sampled[row][-1] for row in rows], device=hidden.device)
            if self.options.drafts == "sampled" and not metadata.all_greedy:
                generators = {rows.index(row): g for row, g in metadata.generators.items() if row in rows}
                tokens, laws = self.chains(hidden, roots, length, metadata.temperature[rows], generators)
                self.laws.remember([runner.input_batch.req_ids[row] for row in rows], laws)
            else:
                tokens = self.search(hidden, roots, self.width, length).paths[:, 0]  # the best beam
            for row, chain in zip(rows, tokens.tolist(), strict=True):
                chains[row] = chain[: room_before_end(runner.requests[runner.input_batch.req_ids[row]], length)]
        return chains

    def chains(
        self, hidden: Tensor, roots: Tensor, length: int, temperature: Tensor, generators: dict[int, torch.Generator]
    ) -> tuple[Tensor, Tensor]:  # (R, H), (R,), (R,) -> (R, L), (R, L, D)
        """A chain drawn from each root; a request with a seed draws from its own generator."""

        def draw(law: Tensor) -> Tensor:
            race = torch.empty_like(law).exponential_()
            for row, generator in generators.items():
                race[row].exponential_(generator=generator)
            return (law / race).argmax(-1)

        return sampled_chain(self.search.steps(hidden, roots), self.drafter.draft_ids, length, temperature, draw)


def propose_draft_token_ids(original: Any, runner: Any, *arguments: Any) -> Any:
    """A chain for every request that got a token in this step, at most K long; none for the others."""
    proposer = runner.drafter
    if not isinstance(proposer, RecurrentDraftProposer):
        return original(runner, *arguments)
    scheduled, sampled, sampling, _, states, _, verified, *_ = arguments  # in the order that was checked
    drafted = verified.num_draft_tokens if verified else [0] * len(sampled)
    length = proposer.planned_length(scheduled, drafted, sampled)
    proposer.laws.forget(runner)
    proposer.laws.newest = proposer.drafts(runner, states, sampling, drafted, sampled, length)
    return proposer.laws.newest


def room_before_end(request: Any, length: int) -> int:
    """How many of a draft's tokens can be verified, given its request and a draft's length.

    While a reply is shorter than ``min_tokens``, vLLM (0.32) masks stop tokens for the bonus token however many draft
    tokens come before it; so the bonus token must not come after the last place where they are masked.
    """
    missing = request.sampling_params.min_tokens - len(request.output_token_ids)
    return min(length, missing - 1) if missing > 0 else length


def states_of(rows: Sequence[int], drafted: Sequence[int], sampled: Sequence[Sequence[int]]) -> list[int]:
    """Where the hidden states stand that each row's newest token was drawn from.

    A request owns as many consecutive states as it had draft tokens, and one: the first belongs to its root.

    >>> states_of([0, 2], [3, 0, 2], [[7, 8], [], [9, 9, 9]])
    [1, 7]
    """
    first = [0, *accumulate(count + 1 for count in drafted)]
    return [first[row] + len(sampled[row]) - 1 for row in rows]


class DraftLaws:
    """The distributions that drafts were drawn from, by request, until they are verified.

    ``newest`` are the drafts that vLLM was given last. Near a request's end of context vLLM verifies drafts of its own
    making; then it holds others.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.newest: list[list[int]] | None = None
        self._laws: dict[str, Tensor] = {}  # (L, D)

    def remember(self, requests: Sequence[str], laws: Tensor) -> None:  # (R, L, D)
        self._laws.update(zip(requests, laws, strict=True))

    def forget(self, runner: Any) -> None:
        self._laws = {request: law for request, law in self._laws.items() if request in runner.requests}

    def of(self, runner: Any, drafted: Sequence[int], draft_ids: Tensor) -> Tensor:  # (tokens, V)
        """For every draft token that is verified now, over the verifier's vocabulary.

        Zero everywhere for a token that was not drawn by the proposer: rejected for certain, which is exact too.
        """
        if runner._draft_token_ids is not self.newest:
            self._laws.clear()
        laws = torch.zeros(sum(drafted), self.vocab_size, device=draft_ids.device)
        first = 0
        for request, count in zip(runner.input_batch.req_ids, drafted, strict=True):
            if (law := self._laws.get(request)) is not None:
                laws[first : first + count, draft_ids] = law[:count]
            first += count
        return laws


def draft_probabilities(original: Any, runner: Any, spec_decode_metadata: Any) -> Tensor | None:
    """What vLLM's rejection sampler needs to know of drafts that were drawn; None for those that were not."""
    proposer = runner.drafter
    if not isinstance(proposer, RecurrentDraftProposer):
        return original(runner, spec_decode_metadata)
    if proposer.options.drafts != "sampled" or runner.input_batch.sampling_metadata.all_greedy:
        return None
    return proposer.laws.of(runner, spec_decode_metadata.num_draft_tokens, proposer.drafter.draft_ids)
