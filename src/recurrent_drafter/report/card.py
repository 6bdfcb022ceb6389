"""The card of a published drafter: what is known of it, each figure with the command that measured it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from recurrent_drafter.bench.columns import ARMS, recorded_rows
from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.records.paths import is_hub_name
from recurrent_drafter.report.document import estimated, fill, markdown

Record = Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of; a record that there is none of is empty."""

    config: RecurrentDraftingConfig
    parameters: int
    base_model: str
    license: str | None = None
    run: Record = field(default_factory=dict)
    verified: Record = field(default_factory=dict)
    tuning: Record = field(default_factory=dict)
    bench: Sequence[Record] = ()


def model_card(repo_id: str, known: CardFacts) -> str:
    """README.md of the repository, with its front matter."""
    base = known.base_model
    linked = is_hub_name(base)
    data = ModelCardData(
        base_model=base if linked else None,
        library_name="transformers",
        license=known.license or "other",
        license_name=None if known.license else "not-stated",
        pipeline_tag="text-generation",
        tags=["custom_generate", "recurrent-drafter", "speculative-decoding"],
    )
    measured = known.run.get("metrics") or {}
    names = ["eval_tokens_per_step", *sorted(name for name in measured if name.startswith("eval_acceptance_pos"))]
    text = fill(
        "card.md",
        **vars(known),
        data=data.to_yaml(),
        repo_id=repo_id,
        name=f"[{base}](https://huggingface.co/{base})" if linked else f"`{base}`",
        metrics={name: measured[name] for name in names if name in measured},
        arms=markdown(recorded_rows([dict(record) for record in known.bench]), ARMS) if known.bench else "",
        join=shlex.join,
        estimated=estimated,
    )
    return str(ModelCard(text))
