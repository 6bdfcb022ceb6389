"""Training a drafter, as a library."""
