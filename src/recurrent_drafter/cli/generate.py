"""``generate_speculator.py`` and ``recurrent-drafter generate``: a reply, a chat, or an evaluation."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.bench.evaluation import AUTOREGRESSIVE, SPECULATIVE, Interview
from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.bench.scores import Evaluation
from recurrent_drafter.cli.chat import Chat
from recurrent_drafter.cli.figures import profile_table, show
from recurrent_drafter.cli.inputs import open_speculator, pack_weights
from recurrent_drafter.cli.main import INTERRUPTED
from recurrent_drafter.cli.options import decoding
from recurrent_drafter.cli.progress import Meter
from recurrent_drafter.data.questions import Question, load_questions, spread
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import Decoding
from recurrent_drafter.measure.ruler import Trial
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.provenance import provenance, write_json
from recurrent_drafter.records.trackers import check_services, evaluation_services, reporting_to


def run(
    which: decoding.SpeculatorOptions,
    sampling: decoding.SamplingOptions,
    options: decoding.GenerateOptions,
    evaluation: decoding.EvaluationOptions,
    *,
    argv: list[str],
) -> int:
    questions = prepare(options, evaluation)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    if not options.autoregressive or evaluation.batch_size > 1:  # plain decoding of one row gains nothing from it
        pack_weights(model)
    if options.autoregressive:
        speculator = RecurrentDraftingSpeculator(lookup=False)
        speculator.attach_verifier(model)
    else:
        speculator = open_speculator(which.drafter, model, tokenizer, which.shape, lookup=which.lookup)
    with profiled() if options.profile else nullcontext() as profile:
        if options.is_evaluation:
            command = ["generate_speculator.py", *argv]
            asked = which, sampling, options, evaluation, command, questions
            code = evaluate(EvaluationTask(*asked, speculator, tokenizer))
        else:
            chat = Chat(speculator, tokenizer, sampling, options)
            code = chat.answer_once(options.prompt) if options.prompt is not None else chat.run()
    if profile is not None:
        Console().print(profile_table(profile))
    return code


@dataclass(frozen=True)
class EvaluationTask:
    """All options of an evaluation, the command line that they came from, and what answers which questions."""

    which: decoding.SpeculatorOptions
    sampling: decoding.SamplingOptions
    options: decoding.GenerateOptions
    evaluation: decoding.EvaluationOptions
    argv: list[str]
    questions: Sequence[Question]
    speculator: RecurrentDraftingSpeculator
    tokenizer: PreTrainedTokenizerBase


def prepare(options: decoding.GenerateOptions, asked: decoding.EvaluationOptions) -> list[Question]:
    """The questions; what can be wrong with them and with the trackers is found here, before a model is loaded."""
    if not options.is_evaluation:
        return []
    check_services(asked.services, evaluation_services())
    if options.prompt is not None:
        return [Question(0, "prompt", "prompt", (options.prompt,))]
    questions = load_questions(asked.dataset_path)
    return spread(questions, asked.max_num_prompts or len(questions))


def evaluate(task: EvaluationTask) -> int:
    """Answer the questions in every arm, and report; 1 if an answer differs beyond numeric ties, 130 on Ctrl-C."""
    arms, asked, console = arms_of(task), task.evaluation, Console()
    way, longest = decoding_of(task)
    settings, drafting = settings_of(task, way, longest), drafting_of(task)
    prompts = sum(len(question.turns) for question in task.questions)
    interview = Interview(arms, task.tokenizer, way, asked.batch_size, longest)
    evaluation = Evaluation(settings, prompts, list(arms), skipped=interview.skipped)
    kind = "comparison" if task.options.compare else next(iter(arms))
    run_name = asked.run_name or os.environ.get("WANDB_NAME") or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    with reporting_to(
        asked.services, run_name=run_name, project=asked.wandb_project, settings={**settings, **drafting}
    ) as log:
        try:
            take_in(evaluation, interview.ask(task.questions), console, log)
        finally:  # whatever ended it, what has been answered is kept
            if asked.output_file is not None:
                made = provenance(task.argv, settings["device"])
                write_json(Path(asked.output_file), {**made, **drafting, **evaluation.as_record()})
        log(evaluation.figures(), evaluation.done)
    show(console, evaluation)
    if asked.output_file is not None:
        console.print(f"every reply: {asked.output_file}", soft_wrap=True)
    if not evaluation.is_complete:
        return INTERRUPTED
    return 1 if evaluation.bugs else 0


def take_in(
    evaluation: Evaluation, trials: Iterator[Trial], console: Console, log: Callable[[dict[str, float], int], None]
) -> None:
    """Add the trials as they come, until they end or Ctrl-C does: each is taken in for all arms or not at all."""
    try:
        with Meter("answering", evaluation.prompts, "prompts") as meter:
            for trial in trials:
                evaluation.trials.append(trial)
                rates = {arm.name: arm.rate for arm in evaluation.arms.values()}
                note = " / ".join(f"{rate:.0f}" for rate in rates.values()) + " tok/s"
                meter.update(evaluation.done, note=note)
                log({f"so_far/{name}_tokens_per_second": rate for name, rate in rates.items()}, evaluation.done)
            evaluation.is_complete = True
    except KeyboardInterrupt:
        console.print()


def arms_of(task: EvaluationTask) -> dict[str, RecurrentDraftingSpeculator]:
    """One way of decoding, or both; the autoregressive one is the reference."""
    if task.options.compare:
        return {AUTOREGRESSIVE: task.speculator.without_drafter(), SPECULATIVE: task.speculator}
    return {AUTOREGRESSIVE if task.options.autoregressive else SPECULATIVE: task.speculator}


def decoding_of(task: EvaluationTask) -> tuple[Decoding, int | None]:
    """How every arm decodes, and how long a prompt may be: as long as the context leaves, or less if asked."""
    verifier, shape, new_tokens = task.speculator.verifier, task.speculator.shape, task.options.max_generation_length
    longest = task.evaluation.max_prompt_length
    if verifier.context_length is not None:
        room = verifier.context_length - max(new_tokens, 1 + shape.beam_length if shape is not None else 0)
        if room < 1:
            raise ValueError(f"--max_generation_length is {new_tokens}, expected less than the context of "
                             f"{verifier.context_length}")  # fmt: skip
        longest = min(longest or room, room)
    end_ids = as_tuple(verifier.model.generation_config.eos_token_id)
    return Decoding(new_tokens, end_ids, task.sampling.arguments(), task.sampling.seed or 0), longest


def settings_of(task: EvaluationTask, way: Decoding, longest: int | None) -> dict[str, Any]:
    """What arms must have in common for their speeds to be one ratio's."""
    verifier = task.speculator.verifier
    asked = repr([(question.name, question.turns) for question in task.questions])
    hardware = provenance([], str(verifier.device))["hardware"]
    return {
        "base_model": task.which.base_model,
        "questions": task.evaluation.dataset_path or ("--prompt" if task.options.prompt else "MT-Bench"),
        "questions_sha256": hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest(),
        "protocol": "reply",
        **way.sampling,
        "max_new_tokens": way.new_tokens,
        "seed": way.seed,
        "batch_size": task.evaluation.batch_size,
        "max_prompt_length": longest,
        "dtype": str(verifier.model.dtype).removeprefix("torch."),
        "device": str(verifier.device),
        "hardware": hardware["device"],
        "threads": hardware["threads"],
    }


def drafting_of(task: EvaluationTask) -> dict[str, Any]:
    """Which drafter, whether lookup, and how much is drafted: what an arm may have to itself."""
    speculator = task.speculator
    sources = {"drafter": task.which.drafter and (task.which.speculator_path or "demo"), "lookup": speculator.lookup}
    if not speculator.speculates:
        return {"drafter": None, "lookup": False}
    return {**sources, "draft_shape": "auto" if speculator.shape is None else asdict(speculator.shape)}
