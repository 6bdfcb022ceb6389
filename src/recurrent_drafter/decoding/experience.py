"""What decoding has learned of the machine and of the replies: it sets the speed of later ones, never a token."""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from recurrent_drafter.decoding.costs import LearnedCosts, Tuning, costs_file
from recurrent_drafter.decoding.draft_controller import LONGEST, TreeController
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.lookup import Lookup, Memory
from recurrent_drafter.decoding.rates import AcceptanceByMatch
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import TUNING_FILE

logger = logging.getLogger(__name__)
SAVED = 30.0  # seconds between two times that costs are written to disk


class Experience:
    """Of one verifier, with one drafter or none.

    Acceptance depends on how tokens are drawn, so it is learned for each temperature (0 is greedy).

    Args:
        costs: what steps take.
        longest: the beam width and the most tokens to draft; None without a drafter.
        memory: earlier replies.
        file: where costs are kept for the next process; None keeps them nowhere.
        clock: seconds; by a clock of one's own, costs tell of no machine and are not kept.
    """

    def __init__(
        self,
        costs: LearnedCosts,
        longest: DraftShape | None,
        memory: Memory,
        file: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.costs, self.longest, self.memory = costs, longest, memory
        self._file, self._clock = file, clock
        self._saved = -math.inf
        self._controllers: dict[float, TreeController] = {}
        self._rates: defaultdict[float, AcceptanceByMatch] = defaultdict(AcceptanceByMatch)

    @classmethod
    def of(
        cls,
        verifier: Verifier,
        drafter: RecurrentDrafter | None,
        tuning: Tuning | None,
        remembered: int,
        clock: Callable[[], float],
    ) -> "Experience":
        """What is known before the first reply: a tuning where it holds, or what earlier processes kept."""
        model, costs, longest = verifier.model, None, None
        if drafter is not None:
            longest = DraftShape(drafter.config.draft_shape.beam_width, LONGEST)
        if tuning is not None:
            reason = tuning.mismatch(model)
            if reason is None:
                costs, longest = LearnedCosts(tuning.costs), DraftShape(tuning.shape.beam_width, LONGEST)
            else:
                logger.info("%s is not used: %s", TUNING_FILE, reason)
        file = costs_file(model, drafter)
        return cls(costs or LearnedCosts.load(file), longest, Memory(remembered), file, clock)

    def afresh(self, longest: DraftShape | None) -> "Experience":
        """The same machine with another drafter, or none: costs are shared, replies are not."""
        return Experience(self.costs, longest, Memory(self.memory.most), self._file, self._clock)

    def controller(self, temperature: float) -> TreeController:
        if temperature not in self._controllers:
            self._controllers[temperature] = TreeController(self.costs, self.longest, self._clock)
        return self._controllers[temperature]

    def lookup(self, state: GenerationState, temperature: float) -> Lookup:
        """For the replies of a generation that begins."""
        return Lookup(state, self._rates[temperature], self.memory)

    def save(self) -> None:
        """Keep what steps take, now and then. A disk that cannot be written to costs nothing but that (logged)."""
        is_real = self._clock is time.perf_counter and not self.costs.is_fresh
        if self._file is None or not is_real or self._clock() - self._saved < SAVED:
            return
        self._saved = self._clock()
        try:
            self.costs.save(self._file)
        except OSError as error:
            logger.info("what steps take is not kept: %s", error)
