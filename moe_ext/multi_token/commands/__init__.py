"""The commands of `python -m moe_ext.multi_token`, one a file; nothing imports them but `__main__`."""
