"""Quantise a mixture-of-experts model by sensitivity, then finetune only its routers; see docs/router_ft.md."""
