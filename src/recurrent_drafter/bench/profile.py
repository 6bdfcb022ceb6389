"""Where a step's time goes, timed from outside: the loop's callables are wrapped while a profile is open."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

from recurrent_drafter.decoding import decode as decode_module
from recurrent_drafter.decoding import speculator as speculator_module
from recurrent_drafter.decoding.draft_controller import TreeController
from recurrent_drafter.decoding.generation_state import GenerationState, Step
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.measure.ruler import now
from recurrent_drafter.models.verifier import VerifierSession

# Every callable of the loop, by what it is for. None of them calls another one.
STAGES: dict[str, list[tuple[Any, str]]] = {
    "verify": [(VerifierSession, "forward_tree")],
    "draft": [(decode_module.BeamDrafter, "__call__")],
    "tree": [(decode_module, "prefix_tree"), (decode_module, "root_tree")],
    "accept": [(decode_module, "follow_tree"), (decode_module, "hidden_after"), (Sampler, "draws")],
    "cache": [(VerifierSession, "keep"), (VerifierSession, "select")],
    "controller": [(TreeController, name) for name in ("plan", "budget", "observe")],
    "host": [(Step, "on_host"), (GenerationState, "emit")],
}
OTHER = "other"


@dataclass
class Profile:
    """Seconds of each stage over the steps after prefill; ``total`` is theirs altogether."""

    steps: int = 0
    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _in_step: bool = False  # prefill calls some of the same functions

    @property
    def rows(self) -> list[tuple[str, float, float]]:
        """Stage, milliseconds per step, share of the step; what no stage explains comes last."""
        parts = {**self.seconds, OTHER: self.total - sum(self.seconds.values())}
        return [
            (name, 1e3 * seconds / max(self.steps, 1), seconds / (self.total or 1.0)) for name, seconds in parts.items()
        ]

    @property
    def overhead(self) -> float:
        """The share of a step that is neither verification nor drafting."""
        return 1 - (self.seconds["verify"] + self.seconds["draft"]) / self.total if self.total else float("nan")

    def timing(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time within steps added to a stage."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._in_step:
                return function(*args, **kwargs)
            begun = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += now() - begun

        return timed

    def timing_steps(self, decode: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The same loop; its steps counted and timed, but for the first, which is prefill."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            steps = decode(*args, **kwargs)
            yield next(steps)
            while True:
                begun, self._in_step = now(), True
                emitted = next(steps, None)
                self._in_step = False
                if emitted is None:
                    return
                self.steps += 1
                self.total += now() - begun
                yield emitted

        return timed


@contextmanager
def profiled() -> Iterator[Profile]:
    """Time every step of every generation inside; on a GPU each stage waits for the device, so steps take longer."""
    profile = Profile()
    with ExitStack() as stack:
        for name, places in STAGES.items():
            for owner, attribute in places:
                stack.enter_context(replaced(owner, attribute, partial(profile.timing, name)))
        stack.enter_context(replaced(speculator_module, "decode", profile.timing_steps))
        yield profile


@contextmanager
def replaced(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put ``around(function)`` in the place of a function or method for a while; class methods stay class methods."""
    original = vars(owner)[name]
    bound_to_class = isinstance(original, classmethod)
    wrapped = around(original.__func__ if bound_to_class else original)
    setattr(owner, name, classmethod(wrapped) if bound_to_class else wrapped)
    try:
        yield
    finally:
        setattr(owner, name, original)
