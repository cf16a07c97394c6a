"""An extension of griffe: a dataclass field shows its `help` and its default in the reference, not `field(...)`."""

import ast

from griffe import Attribute, Docstring, Extension, ObjectNode


class OptionHelp(Extension):
    """Reads `field(default=..., metadata={"help": ...})`."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **kwargs) -> None:
        if not isinstance(node, ast.AnnAssign) or (text := help_of(node.value)) is None:
            return
        attr.docstring = attr.docstring or Docstring(text, parent=attr, lineno=node.lineno)
        arguments = {keyword.arg: keyword.value for keyword in node.value.keywords}
        if "default_factory" not in arguments:
            attr.value = ast.unparse(arguments["default"]) if "default" in arguments else None


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
