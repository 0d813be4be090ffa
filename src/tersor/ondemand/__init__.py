"""On demand: a budget in, the best model found within it out, measured on the real file and engine."""
