"""From a recipe to a run directory: recipes, training, checkpoints, what a run costs, and many runs
side by side."""
