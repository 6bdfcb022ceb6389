"""``generate_speculator.py`` and ``recurrent-drafter generate``: a reply, a chat, or an evaluation."""

from contextlib import nullcontext

from rich.console import Console

from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.cli import evaluate
from recurrent_drafter.cli.chat import Chat
from recurrent_drafter.cli.figures import profile_table
from recurrent_drafter.cli.inputs import open_speculator
from recurrent_drafter.cli.options import decoding
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.loading import load_verifier


def run(
    which: decoding.SpeculatorOptions,
    sampling: decoding.SamplingOptions,
    options: decoding.GenerateOptions,
    evaluation: decoding.EvaluationOptions,
    *,
    argv: list[str],
) -> int:
    questions = evaluate.prepare(options, evaluation)
    model, tokenizer = load_verifier(which.base_model, dtype=which.dtype, device=which.device)
    if options.autoregressive:
        speculator = RecurrentDraftingSpeculator(None)
        speculator.attach_verifier(model)
    else:
        speculator = open_speculator(which.drafter(), model, tokenizer, which.shape)
    with profiled() if options.profile else nullcontext() as profile:
        if options.is_evaluation:
            command = ["generate_speculator.py", *argv]
            asked = which, sampling, options, evaluation, command, questions
            code = evaluate.run(evaluate.Task(*asked, speculator, tokenizer))
        else:
            chat = Chat(speculator, tokenizer, sampling, options)
            code = chat.answer_once(options.prompt) if options.prompt is not None else chat.run()
    if profile is not None:
        Console().print(profile_table(profile))
    return code
