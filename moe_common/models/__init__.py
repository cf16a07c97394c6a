"""Base models by name, their identity, and how good they are: held-out loss, tasks of lm-eval."""
