"""Measuring: timers wrap calls here, and nowhere else."""
