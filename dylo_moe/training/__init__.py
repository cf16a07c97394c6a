"""The training of a mixture beside one LoRA: data, Trainer, comparison; behind `train.py`."""
