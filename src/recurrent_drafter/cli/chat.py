"""Replies as they are accepted: one, or a conversation with history and commands."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.cli.main import INTERRUPTED
from recurrent_drafter.cli.options.decoding import GenerateOptions, SamplingOptions, is_text
from recurrent_drafter.core.metrics import SOURCES, Acceptance, tokens_by_source
from recurrent_drafter.core.tree import DRAFTER, LOOKUP, VERIFIER
from recurrent_drafter.data.dialogues import Turn
from recurrent_drafter.data.templates import encode_prompt
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.ruler import Run

COMMANDS = "/reset /stats /seed N /temp X /speculate on|off /quit"
COLORS = {DRAFTER: "bold green", LOOKUP: "bold cyan"}
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # half a character: its other bytes are still to come


def told(runs: Sequence[Run]) -> str:
    """What replies took, one or all of a session's."""
    tokens, seconds = sum(run.count for run in runs), sum(run.seconds for run in runs)
    steps, replies = sum(len(run.drafts[0]) for run in runs), sum(run.count > 0 for run in runs)
    per_step = f", {(tokens - replies) / steps:.2f} tokens/step" if steps else ""  # prefill's own token left out
    return f"{tokens:,} tokens in {seconds:.1f}s ({tokens / seconds:.1f} tok/s{per_step})"


def sources_told(runs: Sequence[Run]) -> str:
    """Whose drafts their tokens come from, if any do."""
    counts = tokens_by_source(row for run in runs for row in run.sources)
    return "".join(f", {counts[SOURCES[one]]:,} from {SOURCES[one]}" for one in COLORS if counts.get(SOURCES[one]))


class Chat:
    """Replies of one model, streamed to the terminal, by turns with drafts or without."""

    def __init__(
        self,
        speculator: RecurrentDraftingSpeculator,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingOptions,
        options: GenerateOptions,
    ) -> None:
        self.with_drafts, self.speculator = speculator, speculator
        self.tokenizer, self.sampling, self.options = tokenizer, sampling, options
        self.session = speculator.session()  # what turns have in common is read once
        self.prompted = self.kept = 0  # tokens of all prompts, and how many of these had been read before
        self.turns: list[Turn] = []
        self.runs: dict[str, list[Run]] = {}  # all replies, with drafts and without
        self.console = Console(soft_wrap=True, highlight=False)

    def answer_once(self, prompt: str) -> int:
        self._show_legend()
        _, interrupted = self.reply([Turn("user", prompt)])
        return INTERRUPTED if interrupted else 0

    def run(self) -> int:
        """Turn by turn until /quit or the end of the input; the exit code."""
        with suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  # gives input() its line editing and history
        print(f"{COMMANDS}; Ctrl-C ends a reply.")
        self._show_legend()
        while True:
            try:
                print()
                line = input("You: ").strip()
                if line == "/quit":
                    return 0
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._say(line)
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n(/quit ends)")
            except ValueError as error:  # such as a prompt beyond the context: the session goes on without this turn
                print(f"error: {error}", file=sys.stderr)

    def _say(self, line: str) -> None:
        if not is_text(line):
            raise ValueError("that line holds bytes that are no text: expected UTF-8")
        asked = [*self.turns, Turn("user", line)]
        print("\nAssistant: ", end="", flush=True)
        try:
            answer, _ = self.reply(asked)
        except ValueError as error:
            raise ValueError(f"{error} (/reset starts over)") from error
        if answer:
            self.turns = [*asked, Turn("assistant", answer)]

    def reply(self, turns: Sequence[Turn]) -> tuple[str, bool]:
        """Stream one reply, then its figures. Returns its text, and whether Ctrl-C ended it."""
        how: dict[str, Any] = {**self.sampling.arguments(), "seed": self.sampling.seed}
        how["max_new_tokens"] = self.options.max_generation_length
        shown = Streamed(self.tokenizer, self._show, parted=self.options.show_drafts)
        interrupted = False
        drafts: Sequence[tuple[int, int]] = ()
        sources: Sequence[int] = ()
        begun = time.perf_counter()
        try:
            prompt = encode_prompt(turns, self.tokenizer)[None].to(self.speculator.verifier.device)
            with closing(self.speculator.stream(prompt, session=self.session, **how)) as stream:
                for new in stream:
                    (drafts,), (sources,) = self.speculator.stats.drafts, self.speculator.stats.sources
                    shown.add(new, sources[len(shown.tokens) :])
        except KeyboardInterrupt:
            interrupted = True
            print(" [interrupted]", end="")
        if shown.tokens:
            self.prompted, self.kept = self.prompted + prompt.shape[1], self.kept + self.session.reused
        run = Run([shown.tokens], time.perf_counter() - begun, drafts=[list(drafts)], sources=[list(sources)])
        self.runs.setdefault(self._way, []).append(run)
        print(f"\n\nGenerated {told([run])}{sources_told([run])}")
        return shown.text, interrupted

    def _show(self, piece: str, source: int) -> None:
        if source in COLORS:
            self.console.print(Text(piece, COLORS[source]), end="")
        else:
            print(piece, end="", flush=True)

    def _show_legend(self) -> None:
        """Which color is whose, where there are colors."""
        if self.options.show_drafts and self.console.color_system is not None and not self.console.no_color:
            drafting = {DRAFTER: self.speculator.drafter is not None, LOOKUP: self.speculator.lookup}
            shown = [Text(SOURCES[source], COLORS[source]) for source, drafts in drafting.items() if drafts]
            self.console.print("accepted drafts of", *shown)

    @property
    def _way(self) -> str:
        return "with drafts" if self.speculator.speculates else "without drafts"

    def _command(self, name: str, value: str = "") -> None:
        """Do what a line with a slash says. Raises ValueError for one that is none."""
        match name, value:
            case "/reset", "":
                self.turns = []
                print("from the beginning")
            case "/stats", "":
                self._show_totals()
            case "/seed", _:
                self._sample(seed=_number(int, name, value))
            case "/temp", _:
                self._sample(temperature=_number(float, name, value), greedy_search=False)
            case "/speculate", "on" | "off":
                self._speculate(value == "on")
            case _:
                raise ValueError(f"unknown command {' '.join((name, value)).strip()!r}: there are {COMMANDS}")

    def _sample(self, **changed: Any) -> None:
        """Change how tokens are drawn; nothing is changed where that cannot be."""
        sampling = replace(self.sampling, **changed)
        sampling.arguments()
        self.sampling = sampling
        print(", ".join(f"{name} {value}" for name, value in changed.items() if name != "greedy_search"))

    def _speculate(self, wanted: bool) -> None:
        if not self.with_drafts.speculates:
            raise ValueError("nothing is drafted here: start without --autoregressive")
        self.speculator = self.with_drafts if wanted else self.with_drafts.without_drafter()
        print(self._way)

    def _show_totals(self) -> None:
        for way, runs in self.runs.items():
            replies = sum(run.count > 0 for run in runs)
            acceptance = Acceptance.of(draft for run in runs for draft in run.drafts[0])
            accepted = f", {acceptance.rate:.0%} of drafted tokens accepted" if acceptance.drafted else ""
            said = f"{replies} {'reply' if replies == 1 else 'replies'}, {told(runs)}"
            print(f"{way}: {said}{accepted}{sources_told(runs)}")
        if self.runs:
            print(f"prompts: {self.prompted:,} tokens, of which {self.kept:,} were kept from the turns before")
        else:
            print("nothing has been said yet")


class Streamed:
    """Tokens as text, piece by piece; where ``parted``, each piece is of one source."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str, int], None], *, parted: bool) -> None:
        self.tokenizer, self.show, self.parted = tokenizer, show, parted
        self.tokens: list[int] = []
        self.text = ""

    def add(self, new: Sequence[int], sources: Sequence[int]) -> None:
        """Show the tokens of a step, each of which has a source."""
        whose = sources if self.parted else [VERIFIER] * len(new)
        for source, part in groupby(zip(whose, new, strict=True), key=itemgetter(0)):
            self.tokens += [token for _, token in part]
            text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
            text = text.rstrip(UNFINISHED)  # a character may take several tokens
            if len(text) > len(self.text):
                self.show(text[len(self.text) :], source)
                self.text = text


def _number(kind: type, name: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{f'{name} {value}'.strip()}: expected a number after {name}") from None
