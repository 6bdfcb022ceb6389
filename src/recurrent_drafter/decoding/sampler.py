"""The verifier's own draw at a node: transformers' processors, then argmax, with noise when sampling."""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as hf

from recurrent_drafter.core.noise import draw_tokens
from recurrent_drafter.core.tree import DraftTree
from recurrent_drafter.decoding.generation_state import GenerationState

# What these make of a row of scores depends on nothing else, so rows go through them together.
PREFIX_FREE = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TopHLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
)
# These read the prefix, and a row's prefix alone: rows of different lengths go through them one by one.
ROW_BY_ROW = (
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.ForcedBOSTokenLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.WatermarkLogitsProcessor,
)
# These keep state from call to call, or call the model themselves.
REFUSED = (
    hf.SynthIDTextWatermarkLogitsProcessor,
    hf.ClassifierFreeGuidanceLogitsProcessor,
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


class Sampler:
    """Draws the token that the verifier would emit after a node.

    Args:
        state: the replies so far, whose lengths and prefixes draws depend on.
        processors: functions of (input_ids, scores), applied in their order. Any of transformers' or one's own.
        seed: of the noise; None is greedy.
        row_ids: (B,), each sequence's id in the noise; by default its row.
    """

    def __init__(
        self,
        state: GenerationState,
        processors: Sequence[hf.LogitsProcessor] = (),
        seed: int | None = None,
        row_ids: Sequence[int] | None = None,
    ) -> None:
        self.state, self.processors, self.seed = state, tuple(processors), seed
        batch, _ = state.prompts.shape
        self.row_ids = list(range(batch)) if row_ids is None else [int(row) for row in row_ids]
        if len(self.row_ids) != batch:
            raise ValueError(f"row_ids has {len(self.row_ids)} entries, expected one per row of the batch: {batch}")
        self._plain_greedy = seed is None and not self.processors
        self._reads_prefix = not all(type(processor) in PREFIX_FREE for processor in self.processors)

    @classmethod
    def from_hf(
        cls,
        state: GenerationState,
        processors: Sequence[hf.LogitsProcessor] | None,
        config: GenerationConfig,
        seed: int | None,
        row_ids: Sequence[int] | None,
    ) -> "Sampler":
        """As transformers would draw; when sampling without a ``seed``, torch's global generator gives one."""
        if not config.do_sample:
            seed = None
        elif seed is None:
            seed = int(torch.randint(2**62, ()))
        else:
            try:
                seed = operator.index(seed)
            except TypeError:
                raise ValueError(f"seed is {seed!r}, expected an integer") from None
        return cls(state, processors or (), seed, row_ids)

    def draws(self, tree: DraftTree, logits: Tensor) -> Callable[[Tensor], Tensor]:  # (B, N, V)
        """What `follow_tree` asks: nodes (B,) to the tokens (B,) drawn after them."""
        if self._plain_greedy:
            best = logits.argmax(-1)  # (B, N)
            return lambda nodes: best.gather(1, nodes[:, None])[:, 0]
        rows = torch.arange(len(logits), device=logits.device)
        # Not blocking: a plain copy to an accelerator would wait for all of its work.
        lengths = torch.tensor(self.state.lengths).to(logits.device, non_blocking=True)
        row_ids = torch.tensor([self.row_ids[row] for row in self.state.rows]).to(logits.device, non_blocking=True)

        def draw(nodes: Tensor) -> Tensor:
            scores = self.processed(logits[rows, nodes].float(), tree, nodes)
            if self.seed is None:
                return scores.argmax(-1)
            depths = tree.depths.gather(1, nodes[:, None])[:, 0]
            return draw_tokens(scores, self.seed, row_ids, lengths + depths)

        return draw

    def processed(self, scores: Tensor, tree: DraftTree, nodes: Tensor) -> Tensor:  # (B, V) -> (B, V)
        """Logits at nodes (B,) as the processors leave them, each row on its own prefix."""
        if not self._reads_prefix:
            nothing = self.state.prompts[:, :0]
            for processor in self.processors:
                scores = processor(nothing, scores)
            return scores
        drawn = drafted_prefixes(tree, nodes)
        return torch.cat([self._row_processed(index, drawn[index], scores[index, None]) for index in range(len(nodes))])

    def _row_processed(self, index: int, drawn: Sequence[int], scores: Tensor) -> Tensor:  # (1, V) -> (1, V)
        batch, row = len(self.state.generated), self.state.rows[index]
        for processor in self.processors:
            if type(processor) in PREFIX_FREE:
                scores = processor(self.state.prompts[:1, :0], scores)
            elif type(processor) is hf.RepetitionPenaltyLogitsProcessor and not processor.prompt_ignore_length:
                scores = processor(self.state.vocabulary(index, drawn), scores)  # which tokens occur is all it asks
            elif batch == 1 or type(processor) in ROW_BY_ROW:
                scores = processor(self.state.prefix(index, drawn), scores)
            else:  # it may ask which row it is given: it finds this one at its place
                prefix = self.state.prefix(index, drawn).repeat(batch, 1)
                scores = processor(prefix, scores.repeat(batch, 1))[row, None]
        return scores


def drafted_prefixes(tree: DraftTree, nodes: Tensor) -> list[list[int]]:  # (B,)
    """Per row, the draft tokens from below the root down to a node, the node's own included."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    paths = []
    for row, node in enumerate(nodes.tolist()):
        path = []
        while node:
            path.append(tokens[row][node])
            node = parents[row][node]
        paths.append(path[::-1])
    return paths
