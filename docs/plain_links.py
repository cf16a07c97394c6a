"""An extension of griffe: a name that a docstring links for another generator, [`Name`], is shown as code alone."""

import re

from griffe import Docstring, Extension, Object

LINK = re.compile(r"\[(`[^`\]]+`)\](?!\()")


class PlainLinks(Extension):
    """The fork's docstrings are written for doc-builder, whose [`Name`] is a link by itself."""

    def on_instance(self, *, obj: Object, **kwargs) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = LINK.sub(r"\1", obj.docstring.value)
