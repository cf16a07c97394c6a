"""What dylo_moe, the tools of moe_ext and the scripts stand on: text, base models, and how a run keeps its files.

foundation.data          text: built-in domains, a user's own files, hub datasets (`load_documents`)
foundation.packing       documents cut into blocks for language-model training (`pack_documents`)
foundation.batches       rows to tensors, and the order in which a run reads them
foundation.perplexity    held-out perplexity (`measure_texts`, `measure_blocks`)
foundation.base_model    base models by name (`load_base_model`, `resolve_model_name`); base/ is the committed one
foundation.base_identity tells whether an adapter belongs to a base model
foundation.smollm2       fetches and converts SmolLM2-135M
foundation.checkpoints   which checkpoint of a broken run can be trusted
foundation.whole_files   files that are written whole or not at all
foundation.options       a command's options from dataclasses and a YAML file
foundation.allocator     makes training on a CPU several times faster (`keep_freed_memory`)
"""
