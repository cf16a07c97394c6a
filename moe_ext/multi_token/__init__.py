"""Several tokens a backbone pass, from any frozen causal language model: drafts of heads and copies, verified by it.

    python -m moe_ext.multi_token train --model base --data prose --out runs/mt
    python -m moe_ext.multi_token infer --ckpt runs/mt/s2 --prompt "The river"
    python -m moe_ext.multi_token bench --ckpt runs/mt/s2

model          MultiTokenMoE: frozen backbone, heads, router; its losses
heads, router  what is trained; prefix_attention: what heads see of the text; vocabulary: the tokens they choose among
losses         what it is trained on; windows: at every position of a text
copying        drafts copied from the text so far; sources: heads and copies behind one interface
data           question/response pairs and plain text to rows; self_distill: the backbone's own continuations
training       stages 1 and 2; ppo, rewards: stage 3
generation     drafting and verifying inside `generate`; planning: which source drafts, and how much
bench          tokens a pass, acceptance, wall clock, exact match
"""
