"""Base models by name, their identity, and their perplexity."""
