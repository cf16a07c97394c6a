"""What routed LoRA costs, against the base model, plain LoRA, and the other ways to mix adapters.

    make bench                                               every part, through pytest-benchmark
    python -m benchmarks --dtype bfloat16 --parts forward    the same parts one by one

Every figure of speed is a ratio: the ways are timed in turns in one process, and the ratio of each round is taken
before the median. Beside it stands the ratio of the operations that torch counts, which is what arithmetic allows.

models.py      the base model and its sizes          ways.py         what is compared, built over one base
textbook.py    mixtures as a loop over experts       passes.py       mixtures as separate passes
measure.py     seconds in turns, operations          memory.py       peak memory, bytes kept for backward
parts.py       forward, training, scaling, scope, memory             generation.py   tokens/s with a cache
operators.py   where the time goes                   machine.py      what it ran on
engine.py      runs parts, keeps what is done        report.py, targets.py, plots.py, __main__.py
table.py       the short table for a model of the user's own
"""
