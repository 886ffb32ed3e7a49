"""Makes mkdocstrings read the docstrings of this repository as their readers do."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Two habits that griffe does not know."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Takes a section "Example" for what it calls "Examples"."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Takes a public name for the function, where a module of the package has it too."""
        for name in map(str, pkg.exports or ()):
            member = pkg.members.get(name)
            if isinstance(member, griffe.Module):
                pkg.members[name] = griffe.Alias(name, member.members[name], parent=pkg)
