"""`python -m dylo_moe.evaluate`: perplexity by domain, lm-eval tasks and HumanEval of a trained adapter."""
