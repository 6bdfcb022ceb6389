"""The paper's comparisons as a grid of trainings and sweeps: what to run, what came of it, how sure it is."""
