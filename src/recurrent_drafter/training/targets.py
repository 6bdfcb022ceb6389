"""Second stage of a training: text to examples with targets, by the method that was chosen or by ``--quick``."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.data.batches import ShuffledStream, grouped_order, padding_share
from recurrent_drafter.data.dialogues import DataError, Dialogue
from recurrent_drafter.data.encoding import EncodedDialogues, TrainExample
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.measure.estimate import choose_draft_vocabulary, expected_coverage, weights_read
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, greedy_replies, load_replies, save_replies
from recurrent_drafter.models.loading import verifier_fingerprint
from recurrent_drafter.records.provenance import hash_of
from recurrent_drafter.training.arguments import TrainingArguments, global_batch
from recurrent_drafter.training.callbacks import OnProgress, Progress, counting
from recurrent_drafter.training.corpus import Pair, TrainingText
from recurrent_drafter.training.distillation import TokenDraw
from recurrent_drafter.training.examples import RootExample, coverage, frequent_tokens, with_text_targets
from recurrent_drafter.training.target_store import distilled_dataset, hash_of_texts

QUICK_SECONDS = 222  # all of --quick, from the verifier's loading to the saved drafter, stays below 240
QUICK_TEXT_SECONDS = 70
QUICK_REPLIES, QUICK_REPLY_TOKENS = 64, 192  # that are generated at a time

Examples = Sequence[RootExample] | ShuffledStream[RootExample]


@dataclass(frozen=True)
class Material:
    """All that a drafter for this verifier learns from (nothing where it is only evaluated) and is evaluated on."""

    pair: Pair
    train: Examples
    held_out: HeldOutReplies

    @property
    def sample(self) -> Sequence[RootExample]:
        """Examples to count tokens in: all, or those that come first in a stream."""
        return self.train.beginning if isinstance(self.train, ShuffledStream) else self.train


def make_examples(pair: Pair, text: TrainingText, args: TrainingArguments, tell: OnProgress) -> Examples:
    """Examples with targets. Raises DataError where no text is as long as what is to be predicted."""
    if args.streaming:
        stream = streamed(pair, text, args, tell)
        check_depths(stream.beginning, args.depths)
        return stream
    read = encoded(text, pair, args)
    examples = tuple(read)
    tell(Progress("targets", read.report.summary()))
    rows = distilled(pair, examples, args, tell) if args.use_distilled_dataset else with_text(pair, examples, args)
    check_depths(rows, args.depths)
    batches = f"batches of {args.per_device_train_batch_size} ({args.train_sampling_strategy})"
    tell(Progress("targets", f"padding: {padding(rows, args):.1%} of the tokens in {batches}"))
    return rows


def encoded(dialogues: Iterable[Dialogue], pair: Pair, args: TrainingArguments) -> EncodedDialogues:
    scope = args.train_on_assistant_only
    return EncodedDialogues(dialogues, pair.tokenizer, max_length=args.model_max_length, assistant_only=scope)


def with_text(pair: Pair, examples: Iterable[TrainExample], args: TrainingArguments) -> list[RootExample]:
    return [with_text_targets(example, args.depths, pair.end_ids) for example in examples]


def streamed(pair: Pair, text: TrainingText, args: TrainingArguments, tell: OnProgress) -> ShuffledStream[RootExample]:
    """Text targets, made as the data is read."""
    read = encoded(text, pair, args)

    def examples() -> Iterator[RootExample]:
        for number, example in enumerate(read):
            yield replace(with_text_targets(example, args.depths, pair.end_ids), number=number)
        tell(Progress("data", f"read to its end: {text.report.summary()}; {read.report.summary()}"))

    buffer, batch = args.shuffle_buffer, global_batch(args)
    return ShuffledStream(examples, len, buffer=buffer, batch=batch, seed=args.seed)


def distilled(
    pair: Pair, examples: Sequence[TrainExample], args: TrainingArguments, tell: OnProgress
) -> list[RootExample]:
    """The verifier's own continuations, from the store beside the output where an earlier run has made them."""
    chosen = examples[: args.distill_max_examples]
    draw = TokenDraw(args.distill_temperature, args.seed)
    of = {
        "verifier": (verifier := verifier_fingerprint(pair.verifier)),
        "data": hash_of_texts(chosen),
        "tokens": args.distill_num_future_tokens,
        "temperature": draw.temperature,
        "seed": draw.seed if draw.temperature > 0 else None,
    }
    store = Path(str(args.output_dir)) / f"distilled-{hash_of(of)}"
    tell(Progress("distilling", done=0, total=len(chosen)))
    rows = distilled_dataset(
        pair.verifier,
        chosen,
        args.distill_num_future_tokens,
        pair.end_ids,
        store,
        draw=draw,
        fingerprint=verifier,
        on_progress=counting("distilling", tell),
        process=(args.process_index, args.world_size),
    )
    tell(Progress("targets", f"distilled targets: {store}"))
    return [replace(row, targets=row.targets[:, : args.depths]) for row in rows]


def check_depths(examples: Sequence[RootExample], depths: int) -> None:
    """Raise DataError when nothing is to be learnt at the last depth."""
    most = max((int((e.targets != IGNORED).sum(1).max()) for e in examples if len(e.targets)), default=0)
    if most < depths:
        raise DataError(
            f"--drafter_predict_n_tokens is {depths}, and no text goes on for more than {most} tokens after a root: "
            "predict fewer, or give longer texts"
        )


def padding(examples: Sequence[RootExample], args: TrainingArguments) -> float:
    """The share of a batch's tokens that is wasted."""
    lengths = [len(example) for example in examples]
    order: Sequence[int] = range(len(lengths))
    if args.train_sampling_strategy == "group_by_length":
        order = grouped_order(lengths, global_batch(args), torch.Generator().manual_seed(args.seed))
    return padding_share(lengths, order, args.per_device_train_batch_size)


def draft_vocabulary(material: Material, args: TrainingArguments, tell: OnProgress) -> torch.Tensor:  # (D,)
    """The tokens that can be drafted. Raises ValueError for a size that cannot be."""
    verifier, examples, end_ids = material.pair.verifier, material.sample, material.pair.end_ids
    size, vocabulary, why = str(args.draft_vocab_size), verifier.vocab_size, ""
    if size == "auto":
        read = weights_read(verifier, args.exit_dim(verifier.hidden_size), args.drafter_num_layers, rnn=args.rnn)
        number = choose_draft_vocabulary(shares_covered(examples, material.held_out, vocabulary), read, args.depths)
        why = f"; break-even by weights read: {read.break_even(number, args.depths):.2f} tokens per step"
    else:
        number = vocabulary if size == "all" else int(size)
        number = min(number, vocabulary) if args.quick else number
    least = len(end_ids) + 1
    if not least <= number <= vocabulary:
        raise ValueError(f"--draft_vocab_size is {number}, expected {least} to {vocabulary}, 'auto' or 'all'")
    draft_ids = frequent_tokens(examples, number, vocabulary, end_ids)
    roots = sum(len(example.positions) for example in examples)
    said = torch.cat([reply.tokens for reply in material.held_out.replies])
    covered, said_share = coverage(examples, draft_ids), float(torch.isin(said, draft_ids).float().mean())
    account = (
        f"{len(examples):,} texts, {roots:,} roots; the draft vocabulary of {number:,} (of {vocabulary:,}{why}) "
        f"covers {covered:.1%} of the targets, {said_share:.1%} of the held-out replies"
    )
    tell(Progress("targets", account))
    return draft_ids


def shares_covered(examples: Sequence[RootExample], held_out: HeldOutReplies, vocab_size: int) -> torch.Tensor:  # (V,)
    """What the most frequent 1 .. V tokens cover: as the sample lets expect, but no more than of the held-out replies.

    Counted are targets of the first depth: over all depths, a token of the text counts K times.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for example in examples:
        first = example.targets[:, 0]
        counts += torch.bincount(first[first != IGNORED], minlength=vocab_size)
    said = torch.bincount(torch.cat([reply.tokens for reply in held_out.replies]), minlength=vocab_size)
    seen = said[counts.argsort(descending=True, stable=True)].cumsum(0) / said.sum()
    return torch.minimum(expected_coverage(counts), seen.double())


def quick_examples(pair: Pair, text: TrainingText, args: TrainingArguments, begun: float, tell: OnProgress) -> Examples:
    """The verifier's own text, kept in the output folder for a training that is resumed."""
    kept = Path(str(args.output_dir)) / "text.safetensors"
    if args.resume_from_checkpoint is None:
        save_replies(kept, quick_text(pair, text, begun, tell))
    elif not kept.is_file():
        raise OSError(f"{kept} is missing, the text that this training began with: begin a new one")
    return [with_text_targets(reply.as_example(), args.depths, ()) for reply in load_replies(kept)]


def quick_text(pair: Pair, text: TrainingText, begun: float, tell: OnProgress) -> list[Reply]:
    """Distilled targets at the price of generation: the text itself is the verifier's greedy continuation of prompts.

    What follows a position of such a text is what the verifier generates there, so every position has its distilled
    target already. As many texts as the time allows that is left of a training ``begun`` then.
    """
    dialogues = list(text)
    most = min(len(dialogues), 640)
    prompts = prompts_from_dialogues(dialogues, pair.tokenizer, count=most, max_length=128, fewest=1)
    replies: list[Reply] = []
    here = time.monotonic()

    def told(*_: int) -> None:
        done = min(time.monotonic() - here, QUICK_TEXT_SECONDS)
        tell(Progress("verifier's own text", f"{len(replies)} texts", done, QUICK_TEXT_SECONDS))

    told()
    for start in range(0, len(prompts), QUICK_REPLIES):
        some = prompts[start : start + QUICK_REPLIES]
        replies += greedy_replies(pair.verifier, some, QUICK_REPLY_TOKENS, (), len(some), told)
        spent = time.monotonic() - here
        late = time.monotonic() - begun > QUICK_SECONDS / 2
        if spent * (1 + QUICK_REPLIES / len(replies)) > QUICK_TEXT_SECONDS or late:
            break
    tell(Progress("verifier's own text", f"{len(replies)} texts", QUICK_TEXT_SECONDS, QUICK_TEXT_SECONDS))
    return replies


def quick_schedule(args: TrainingArguments, begun: float) -> float:
    """Set the hyperparameters of ``--quick``; when training is to end, by the monotonic clock."""
    args.num_train_epochs = 1000
    args.per_device_train_batch_size = 4
    args.learning_rate = 2e-3
    args.adam_beta2 = 0.98
    args.logging_steps = 5
    args.save_strategy = "no"
    args.eval_strategy = "no"
    return begun + QUICK_SECONDS
