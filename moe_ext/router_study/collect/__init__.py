"""What is read while a model runs: counts, totals, a sample, the words."""
