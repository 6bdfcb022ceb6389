"""What vLLM is told about a drafter: the part of its ``additional_config`` that is ours."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

KEY = "recurrent_drafter"


@dataclass(frozen=True)
class ServingOptions:
    """Options of a served drafter, given as ``--additional-config '{"recurrent_drafter": {...}}'``.

    Attributes:
        speculator: the drafter's folder or hub id; vLLM's speculative config names it.
        revision: of the hub id.
        beam_width: W of the beam search whose best beam vLLM verifies; None is the drafter's own.
        drafts: ``beam`` is that best beam for every request; ``sampled`` draws the drafts of requests that sample from
            the drafter's own distribution, which vLLM is told, and of which it accepts more. None is ``sampled`` where
            one process drafts.
        shed: draft less, or nothing, for as many rows as it does not pay for.
    """

    speculator: str = ""
    revision: str | None = None
    beam_width: int | None = None
    drafts: Literal["beam", "sampled"] | None = None
    shed: bool = True

    def __post_init__(self) -> None:
        width = self.beam_width
        for name, holds, expected in (
            ("beam_width", width is None or (type(width) is int and width >= 1), "an integer of at least 1"),
            ("drafts", self.drafts in ("beam", "sampled", None), "'beam' or 'sampled'"),
            ("shed", isinstance(self.shed, bool), "true or false"),
        ):
            if not holds:
                raise ValueError(f"{KEY}.{name} is {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def parse(cls, additional_config: Mapping[str, Any], **changes: Any) -> "ServingOptions":
        """From vLLM's ``additional_config``. Raises ValueError for a name or value that is none of ours."""
        given = additional_config.get(KEY, {})
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or (unknown := sorted(set(given) - set(names))):
            what = f"has {unknown[0]!r} in it" if isinstance(given, Mapping) else f"is {given!r}"
            raise ValueError(f"additional_config.{KEY} {what}, expected some of {', '.join(names)}")
        return cls(**{**given, **changes})

    def into(self, additional_config: Mapping[str, Any]) -> dict[str, Any]:
        """VLLM's ``additional_config`` with these options in it."""
        return {**additional_config, KEY: asdict(self)}
