"""The commands of `python -m moe_ext.router_study`, one a file; nothing imports them but `__main__`."""
