"""Training: recipes, optimiser groups, schedule, checkpoints and the progress line."""
