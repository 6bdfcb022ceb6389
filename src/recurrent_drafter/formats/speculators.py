"""Recurrent drafters in the ``speculators`` package.

After ``import recurrent_drafter.formats.speculators``,

    speculators.SpeculatorModel.from_pretrained("./my-drafter")

gives a `RecurrentDrafterSpeculator` for any drafter that names its verifier.
"""

from dataclasses import fields
from importlib import metadata
from typing import Any, ClassVar, Literal

from recurrent_drafter.models.config import SPECULATORS_VERSION, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter

NEEDED = f"recurrent_drafter.formats.speculators needs speculators {SPECULATORS_VERSION}"
INSTALL = "pip install 'recurrent-drafter[speculators]'"

try:
    from pydantic import model_validator
    from speculators import SpeculatorModel, SpeculatorModelConfig
except ImportError as error:
    raise ImportError(f"{NEEDED}, which cannot be imported ({error}): {INSTALL}") from error
if (found := metadata.version("speculators")) != SPECULATORS_VERSION:  # its registries are not a settled interface
    raise ImportError(f"{NEEDED}, and {found} is installed: {INSTALL}")


@SpeculatorModelConfig.register("recurrent_drafter")
class RecurrentDrafterSpeculatorConfig(SpeculatorModelConfig):
    """`RecurrentDraftingConfig` as ``speculators`` knows configs: the fields are checked and written by that class."""

    model_type: ClassVar[str] = RecurrentDraftingConfig.model_type
    speculators_model_type: Literal["recurrent_drafter"] = "recurrent_drafter"

    @model_validator(mode="before")
    @classmethod
    def _as_written_by_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        written = RecurrentDraftingConfig(**given).to_dict()
        return {name: value for name, value in written.items() if name != "model_type"}

    @property
    def ours(self) -> RecurrentDraftingConfig:
        """The config that this one stands for."""
        values = {field.name: getattr(self, field.name) for field in fields(RecurrentDraftingConfig)}
        return RecurrentDraftingConfig(**values | {"architectures": [RecurrentDrafter.__name__]})

    def to_dict(self) -> dict[str, Any]:
        """As our config is written, so that our loader reads what ``speculators`` saves."""
        return self.ours.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return self.ours.to_diff_dict()


@SpeculatorModel.register("recurrent_drafter")
class RecurrentDrafterSpeculator(RecurrentDrafter, SpeculatorModel):
    """The drafter itself, opened and saved by ``speculators``. Training is this package's own."""

    config_class = RecurrentDrafterSpeculatorConfig  # type: ignore[assignment]


SpeculatorModelConfig.reload_schema()  # of its registry a copy was made when speculators was imported
