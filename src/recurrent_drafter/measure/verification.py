"""Does speculation change a token? All arms on all prompts, and a record that lies beside the drafter."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure import arms as ways
from recurrent_drafter.measure.arms import AUTO, HF, PLAIN, Batch, Decoding
from recurrent_drafter.measure.divergence import NOTHING
from recurrent_drafter.measure.ruler import BUG, Arm, Trial, Verdict, interleave, judge, tokens_per_step
from recurrent_drafter.models.verifier import Verifier

DRAFTED = "speculation"


@dataclass(frozen=True)
class Comparison:
    """One prompt's replies by two arms, the first of which is the reference."""

    prompt: int
    reference: str
    candidate: str
    verdict: Verdict

    @property
    def kind(self) -> str:
        return "BUG" if self.verdict.outcome == BUG else self.verdict.outcome

    def as_row(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """For a file: a divergence's place, margin and both tokens, which are nothing where a reply has ended."""
        row = {"prompt": self.prompt, "reference": self.reference, "candidate": self.candidate, "verdict": self.kind}
        if (found := self.verdict.divergence) is not None:
            row |= {"position": found.position, "margin": found.margin, "tolerance": found.tolerance}
            for side, token in (("expected", found.expected), ("found", found.found)):
                known = token != NOTHING
                row[side] = {"id": token if known else None, "text": tokenizer.decode([token]) if known else None}
        return row

    def explained(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """A divergence in one line; prompts and tokens are counted from 0."""
        row, found = self.as_row(tokenizer), self.verdict.divergence
        assert found is not None
        sides = (row["expected"], row["found"])
        has, instead = ("nothing" if side["id"] is None else "{id} {text!r}".format(**side) for side in sides)
        where = f"prompt {self.prompt}, token {found.position}"
        return f"{where}: {self.reference} has {has}, {self.candidate} {instead}: {found.verdict}"


@dataclass
class Verification:
    """All prompts decoded in one way of drawing tokens, greedy or sampled: by which arms, and what was found."""

    name: str
    decoding: Decoding
    arms: Sequence[Arm]
    trials: list[Trial] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)

    def verify(
        self, verifier: Verifier, batches: Sequence[Batch], pack: Callable[[], None] | None = None
    ) -> Iterator[Batch]:
        """Decode batches in every way and compare each arm with the references before it; yields what is done.

        Transformers' own decoding comes first, for all batches; then ``pack`` may pack the model's weights.
        """
        explain = ways.explaining(verifier, self.decoding)
        first = [arm for arm in self.arms if arm.name == HF]
        references = [{arm.name: arm.run(batch) for arm in first} for batch in batches]
        if pack is not None:
            pack()
        ours = [arm for arm in self.arms if arm.name != HF]
        for before, own in zip(references, interleave(ours, batches), strict=True):
            trial = replace(own, runs={**before, **own.runs})
            explained, judged = explain(trial.batch), {}
            for reference, candidate in itertools.combinations(trial.runs, 2):
                if reference in (HF, PLAIN):
                    judged[reference, candidate] = judge(trial.runs[candidate], trial.runs[reference], explained)
            for row, number in enumerate(trial.batch.row_ids):
                self.comparisons += [Comparison(number, *pair, verdicts[row]) for pair, verdicts in judged.items()]
            self.trials.append(trial)
            yield trial.batch

    @property
    def differing(self) -> list[Comparison]:
        return [found for found in self.comparisons if found.verdict.divergence is not None]

    @property
    def pairs(self) -> dict[tuple[str, str], Counter[str]]:
        """How many comparisons came out how, by reference and candidate."""
        counts: dict[tuple[str, str], Counter[str]] = {}
        for found in self.comparisons:
            counts.setdefault((found.reference, found.candidate), Counter())[found.kind] += 1
        return counts


def as_record(passes: Sequence[Verification]) -> dict[str, Any]:
    """What was compared and how it came out, for a file."""

    def counts(run: Verification) -> Iterator[dict[str, Any]]:
        for (reference, candidate), kinds in run.pairs.items():
            per_step = tokens_per_step(run.trials, candidate)
            figure = {"tokens_per_step": per_step if per_step == per_step else None}
            yield {"reference": reference, "candidate": candidate, **figure, **kinds}

    def settings(decoding: Decoding) -> dict[str, Any]:
        return {**decoding.arguments(), "seed": decoding.seed if decoding.is_sampled else None}

    return {
        "settings": {run.name: settings(run.decoding) for run in passes},
        "counts": {run.name: list(counts(run)) for run in passes},
        "bugs": sum(found.verdict.outcome == BUG for run in passes for found in run.comparisons),
    }


def verifications(
    speculator: RecurrentDraftingSpeculator, greedy: Decoding, sampled: Decoding | None, *, auto: bool
) -> list[Verification]:
    """Greedy, with transformers' own loop as the first reference, then sampled if that is asked for.

    What is verified is a tree of one shape, the drafter's own if none is fixed, which lookup joins where the speculator
    looks up; without a drafter it is lookup alone.
    """
    model, drafter = speculator.verifier.model, speculator.drafter
    ours = {PLAIN: speculator.without_drafter(), DRAFTED: speculator}
    if drafter is not None:
        shape = speculator.shape or drafter.config.draft_shape
        ours[DRAFTED] = speculator.with_shape(shape).with_lookup(speculator.lookup)
        ours |= {AUTO: speculator.with_shape(None)} if auto else {}

    def arms_of(decoding: Decoding) -> list[Arm]:
        return [ways.our_arm(name, way, decoding) for name, way in ours.items()]

    found = [Verification("greedy", greedy, [ways.hf_arm(HF, model, greedy), *arms_of(greedy)])]
    return found if sampled is None else [*found, Verification("sampled", sampled, arms_of(sampled))]
