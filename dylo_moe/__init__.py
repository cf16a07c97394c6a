"""DyLoRA-MoE: a mixture of LoRA experts that grows with the skills it meets, on top of the PEFT fork's routed LoRA.

Import what you need from the module that holds it:

    dylo_moe.data         text: built-in domains, a user's own files, hub datasets (`load_documents`)
    dylo_moe.packing      documents cut into blocks for language-model training (`pack_documents`)
    dylo_moe.perplexity   held-out perplexity (`measure_texts`, `measure_blocks`)
    dylo_moe.base_model   base models by name (`load_base_model`, `resolve_model_name`)
    dylo_moe.smollm2      fetches and converts SmolLM2-135M
    dylo_moe.allocator    makes training on a CPU several times faster (`keep_freed_memory`)
"""
