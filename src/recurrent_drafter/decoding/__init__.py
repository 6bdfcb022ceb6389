"""The paper's loop, and what decides how much it drafts."""
