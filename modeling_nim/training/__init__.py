"""Training: recipes, optimizer groups, schedule, checkpoints and the progress line."""
