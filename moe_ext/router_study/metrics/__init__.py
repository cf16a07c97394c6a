"""What is measured, one idea a file: each figure with its formula, its source, and what chance would give."""
