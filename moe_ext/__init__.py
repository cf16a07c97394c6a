"""Tools for people who work on mixtures of experts: one subpackage each, none of which imports another.

A tool imports transformers and the PEFT fork. What two tools need lies in a small named module beside them.
"""
