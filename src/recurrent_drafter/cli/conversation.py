"""The one conversation that the commands for understanding look at."""

from dataclasses import dataclass

from recurrent_drafter.cli.options.measuring import ConversationOptions
from recurrent_drafter.data.dialogues import Dialogue
from recurrent_drafter.data.encoding import EncodedDialogues, TrainExample
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.training.corpus import Pair, pair_of


@dataclass(frozen=True)
class Opened:
    """A verifier with its tokenizer, and a conversation that is cut at ``length`` tokens."""

    pair: Pair
    dialogue: Dialogue
    length: int

    def example(self, assistant_only: bool) -> TrainExample:
        """The conversation as training reads it. Raises DataError where that scope holds nothing to learn."""
        encoded = EncodedDialogues(
            [self.dialogue], self.pair.tokenizer, max_length=self.length, assistant_only=assistant_only
        )
        return next(iter(encoded))


def open_conversation(options: ConversationOptions, beyond: int = 0) -> Opened:
    """Load the model and the conversation, so much of it that ``beyond`` more tokens fit the model's context."""
    name = None if options.dataset_path else options.dataset_name or "demo"
    wanted = options.conversation + 1
    dialogues = load_dialogues(name, options.dataset_path, "eval" if name else "all", limit=wanted).dialogues
    if len(dialogues) < wanted:
        raise ValueError(
            f"--conversation is {options.conversation}, expected less than {len(dialogues)}: that is all there is"
        )
    pair = pair_of(*load_verifier(options.base_model, dtype=options.dtype, device=options.device))
    context = pair.verifier.context_length
    length = options.model_max_length if context is None else min(options.model_max_length, context - beyond)
    if length < 2:
        raise ValueError(f"{beyond} tokens more do not fit the context of {context} tokens: ask for fewer")
    return Opened(pair, dialogues[-1], length)
