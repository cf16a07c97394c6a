"""Skills that arrive one after another: the mixture grows, and is compared with one LoRA."""
