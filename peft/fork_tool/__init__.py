"""The modules of fork.py and the upstream tests. They run before anything is installed: standard library only."""
