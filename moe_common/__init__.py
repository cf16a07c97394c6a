"""What dylo_moe, the tools of moe_ext and the scripts stand on: text, base models, and how a run keeps its files.

text.documents         text: built-in domains, a user's own files, hub datasets (`load_documents`)
text.reading           which documents of a source are read, in which order, as how many blocks (`read_blocks`)
text.instructions      conversations as tokens, with labels on the answers alone (`encode_examples`)
text.packing           documents cut into blocks for language-model training (`pack_documents`)
text.batches           rows to tensors, and the order in which a run reads them
models.base_model      base models by name (`load_base_model`, `resolve_model_name`); base/ is the committed one
models.base_identity   tells whether an adapter belongs to a base model
models.smollm2         fetches and converts SmolLM2-135M
models.perplexity      held-out loss and perplexity (`measure_texts`, `measure_blocks`, `block_losses`)
models.lm_eval_tasks   tasks of lm-eval on a loaded model (`find_tasks`, `run_tasks`)
runs.trainer_arguments what all trainings tell transformers' Trainer (`trainer_arguments`)
runs.trainer_callbacks annealing, and lines of the log
runs.checkpoints       which checkpoint of an interrupted run can be trusted
runs.whole_files       files that are written whole or not at all
runs.options           a command's options from dataclasses and a YAML file
runs.allocator         makes training on a CPU several times faster (`keep_freed_memory`)
"""
