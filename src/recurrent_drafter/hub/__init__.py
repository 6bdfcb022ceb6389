"""Publishing on the Hugging Face Hub, and what published repositories import from here: these names cannot move."""

from recurrent_drafter.hub.published import generate_with_drafter, loaded

__all__ = ["generate_with_drafter", "loaded"]
