"""The commands of `python -m moe_ext.moqe`, one a file; nothing imports them but `__main__`."""
