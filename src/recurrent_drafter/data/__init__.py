"""Conversations and texts, from where they lie to the tokens and masks of training examples."""
