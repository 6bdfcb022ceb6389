"""``generate_speculator.py`` and ``recurrent-drafter generate``: a reply, a chat, or an evaluation."""

from collections.abc import Sequence
from contextlib import nullcontext

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.cli import evaluate
from recurrent_drafter.cli.chat import Chat
from recurrent_drafter.cli.figures import profile_table
from recurrent_drafter.cli.options.decoding import (
    EvaluationOptions,
    GenerateOptions,
    SamplingOptions,
    SpeculatorOptions,
)
from recurrent_drafter.cli.speculator import open_speculator
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_verifier


def run(
    which: SpeculatorOptions,
    sampling: SamplingOptions,
    options: GenerateOptions,
    evaluation: EvaluationOptions,
    *,
    argv: Sequence[str],
) -> int:
    """Generate with a drafter, or by the verifier alone: one reply, a chat, or MT-Bench with all figures."""
    questions = evaluate.prepare(options, evaluation)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    speculator = autoregression(model) if options.autoregressive else load_speculator(which, model, tokenizer)
    with profiled() if options.profile else nullcontext() as profile:
        if options.is_evaluation:
            task = evaluate.Task(which, sampling, options, evaluation, ["generate_speculator.py", *argv])
            code = evaluate.run(task, questions, speculator, tokenizer)
        else:
            chat = Chat(speculator, tokenizer, sampling, options)
            code = chat.answer_once(options.prompt) if options.prompt is not None else chat.run()
    if profile is not None:
        Console().print(profile_table(profile))
    return code


def autoregression(model: PreTrainedModel) -> RecurrentDraftingSpeculator:
    """The same loop without a drafter."""
    speculator = RecurrentDraftingSpeculator(None)
    speculator.attach_verifier(model)
    return speculator


def load_speculator(
    options: SpeculatorOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecurrentDraftingSpeculator:
    """The drafter asked for, attached to the model; for ``demo`` the bundled one unless another is named."""
    speculator = open_speculator(options.drafter(), model, tokenizer)
    assert speculator.drafter is not None
    saved = speculator.drafter.config.draft_shape
    if any(given is not None for given in (options.beam_width, options.beam_length, options.max_tree_nodes)):
        speculator.shape = DraftShape(
            saved.beam_width if options.beam_width is None else options.beam_width,
            saved.beam_length if options.beam_length is None else options.beam_length,
            options.max_tree_nodes,
        )
    return speculator
