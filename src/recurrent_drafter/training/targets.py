"""Second stage of a training: text to examples with targets, by the method that was chosen."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import Progress

from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.data.batches import ShuffledStream, grouped_order, padding_share
from recurrent_drafter.data.dialogues import DataError
from recurrent_drafter.data.encoding import Encoded, TrainExample, encode_examples, iterate_examples
from recurrent_drafter.measure.estimate import choose_draft_vocabulary, expected_coverage, weights_read
from recurrent_drafter.measure.replies import HeldOutReplies
from recurrent_drafter.models.loading import verifier_fingerprint
from recurrent_drafter.records.hashes import hash_of, hash_of_tensors
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.corpus import Pair, TrainingText
from recurrent_drafter.training.examples import RootExample, coverage, frequent_tokens, with_text_targets
from recurrent_drafter.training.target_store import distilled_dataset


@dataclass(frozen=True)
class Targets:
    """What the trainer is given: ``train`` whole or as a stream, and ``sample`` to count tokens in."""

    train: Sequence[RootExample] | ShuffledStream[RootExample]
    sample: Sequence[RootExample]


def make_targets(pair: Pair, text: TrainingText, args: TrainingArguments, progress: Progress) -> Targets:
    """Examples with targets. Raises DataError where no text is as long as what is to be predicted."""
    if args.streaming:
        targets = streamed(pair, text, args)
    else:
        examples, report = encode_examples(
            text.dialogues,
            pair.tokenizer,
            max_length=args.model_max_length,
            assistant_only=args.train_on_assistant_only,
        )
        print(report.summary())
        rows = (
            distilled(pair, examples, args, progress) if args.use_distilled_dataset else with_text(pair, examples, args)
        )
        targets = Targets(rows, rows)
    check_depths(targets.sample, args.depths)
    if not args.streaming:
        report_padding(targets.sample, args)
    return targets


def with_text(pair: Pair, examples: Sequence[TrainExample], args: TrainingArguments) -> list[RootExample]:
    """Targets that are the text itself."""
    return [with_text_targets(example, args.depths, pair.end_ids) for example in examples]


def streamed(pair: Pair, text: TrainingText, args: TrainingArguments) -> Targets:
    """Text targets, made as the data is read."""

    def examples() -> Iterator[RootExample]:
        counts = Encoded()
        encoded = iterate_examples(
            text.dialogues,
            pair.tokenizer,
            max_length=args.model_max_length,
            assistant_only=args.train_on_assistant_only,
            counts=counts,
        )
        for number, example in enumerate(encoded):
            yield replace(with_text_targets(example, args.depths, pair.end_ids), number=number)
        print(f"read to its end: {text.report.summary()}; {counts.report().summary()}")

    stream = ShuffledStream(
        examples, example_length, buffer=args.shuffle_buffer, batch=global_batch(args), seed=args.seed
    )
    return Targets(stream, list(itertools.islice(examples(), args.shuffle_buffer)))


def distilled(
    pair: Pair, examples: Sequence[TrainExample], args: TrainingArguments, progress: Progress
) -> list[RootExample]:
    """The verifier's own continuations, from the store beside the output where an earlier run has made them."""
    chosen = examples[: args.distill_max_examples]
    verifier = verifier_fingerprint(pair.verifier)
    of = {
        "verifier": verifier,
        "data": hash_of_tensors(tensor for e in chosen for tensor in (e.input_ids, e.span_ids)),
        "tokens": args.distill_num_future_tokens,
        "temperature": args.distill_temperature,
        "seed": args.seed if args.distill_temperature > 0 else None,
    }
    store = Path(str(args.output_dir)) / f"distilled-{hash_of(of)}"
    task = progress.add_task("distilling", total=len(chosen), note="")
    rows = distilled_dataset(
        pair.verifier,
        chosen,
        args.distill_num_future_tokens,
        pair.end_ids,
        store,
        temperature=args.distill_temperature,
        seed=args.seed,
        fingerprint=verifier,
        on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        process_index=args.process_index,
        process_count=args.world_size,
    )
    print(f"distilled targets: {store}")
    return [RootExample(row.input_ids, row.positions, row.targets[:, : args.depths]) for row in rows]


def check_depths(examples: Sequence[RootExample], depths: int) -> None:
    """Raise DataError when nothing is to be learnt at the last depth."""
    most = max((int((e.targets != IGNORED).sum(1).max()) for e in examples if len(e.targets)), default=0)
    if most < depths:
        raise DataError(
            f"--drafter_predict_n_tokens is {depths}, and no text goes on for more than {most} tokens behind a root: "
            "predict fewer, or give longer texts"
        )


def report_padding(examples: Sequence[RootExample], args: TrainingArguments) -> None:
    """Print what batches waste."""
    lengths, batch = [example_length(example) for example in examples], args.per_device_train_batch_size
    order: Sequence[int] = range(len(lengths))
    if args.train_sampling_strategy == "group_by_length":
        order = grouped_order(lengths, global_batch(args), torch.Generator().manual_seed(args.seed))
    share = padding_share(lengths, order, batch)
    print(f"padding: {share:.1%} of the tokens in batches of {batch} ({args.train_sampling_strategy})")


def example_length(example: RootExample) -> int:
    """Tokens of its text."""
    return len(example.input_ids)


def global_batch(args: TrainingArguments) -> int:
    """Examples per step over all processes: the order of training depends on nothing else."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def draft_vocabulary(
    pair: Pair, examples: Sequence[RootExample], held_out: HeldOutReplies, args: TrainingArguments
) -> torch.Tensor:  # (D,)
    """The tokens that can be drafted, with their coverage printed."""
    verifier, size, why = pair.verifier, str(args.draft_vocab_size), ""
    least = len(pair.end_ids) + 1
    if size == "auto":
        read = weights_read(verifier, exit_dim(pair, args), args.drafter_num_layers, rnn=args.rnn)
        number = choose_draft_vocabulary(shares_covered(examples, held_out, verifier.vocab_size), read, args.depths)
        why = f"; break-even by weights read: {read.break_even(number, args.depths):.2f} tokens per step"
    elif args.quick:
        number = min(int(size), verifier.vocab_size)
    else:
        number = verifier.vocab_size if size == "all" else int(size)
    if not least <= number <= verifier.vocab_size:
        raise ValueError(f"--draft_vocab_size is {number}, expected {least} to {verifier.vocab_size}, 'auto' or 'all'")
    draft_ids = frequent_tokens(examples, number, verifier.vocab_size, pair.end_ids)
    roots = sum(len(example.positions) for example in examples)
    said = torch.cat([reply.tokens for reply in held_out.replies])
    print(
        f"{len(examples):,} texts, {roots:,} roots; the draft vocabulary of {number:,} "
        f"(of {verifier.vocab_size:,}{why}) covers {coverage(examples, draft_ids):.1%} of the targets, "
        f"{float(torch.isin(said, draft_ids).float().mean()):.1%} of the held-out replies"
    )
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


def exit_dim(pair: Pair, args: TrainingArguments) -> int:
    """E."""
    return max(1, round(args.exit_dim_multiplier * pair.verifier.hidden_size))
