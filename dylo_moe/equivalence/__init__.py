"""Checks that routed LoRA computes what it says, on any causal language model; see docs/validation.md."""
