"""Pure tensor functions: beam search, prefix tree, acceptance, noise, losses, metrics."""
