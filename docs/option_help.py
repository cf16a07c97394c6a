"""An extension of griffe: the `help` of a dataclass field is the field's docstring, so that the reference shows it."""

import ast

from griffe import Attribute, Docstring, Extension, ObjectNode


class OptionHelp(Extension):
    """Reads `field(metadata={"help": ...})`."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **kwargs) -> None:
        if attr.docstring is None and isinstance(node, ast.AnnAssign) and (text := help_of(node.value)):
            attr.docstring = Docstring(text, parent=attr, lineno=node.lineno)


def help_of(value: ast.expr | None) -> str | None:
    """The help text in the call of `field`, or None."""
    if not isinstance(value, ast.Call) or getattr(value.func, "id", None) != "field":
        return None
    for keyword in value.keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, text in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(text, ast.Constant):
                    return text.value
    return None
