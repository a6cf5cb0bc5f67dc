"""Placeholders such as `{{name}}` in the texts of a row: filled in, or found."""

import marshal
import re
from collections.abc import Mapping
from typing import Any

from stages.data.row import RowError
from stages.runtime.errors import nearest

_PLACEHOLDER = re.compile(r"\{\{ *([^\W\d]\w*) *\}\}")


class Filler:
    """Replaces placeholders, and remembers which names it replaced."""

    def __init__(self, fill: Mapping[str, str]) -> None:
        """`fill`: name → the text that replaces its placeholder."""
        self.fill = fill
        self.used: set[str] = set()

    def __call__(self, value: Any) -> Any:
        """A JSON value with every placeholder in its texts replaced. Raises RowError for a name not in `fill`."""
        if isinstance(value, str):
            return _PLACEHOLDER.sub(lambda match: self._text(match[1]), value) if "{{" in value else value
        if isinstance(value, list):
            return [self(entry) for entry in value]
        return {key: self(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    def _text(self, name: str) -> str:
        if name not in self.fill:
            raise RowError(f"`{{{{{name}}}}}` is a placeholder that `fill:` does not name{nearest(name, self.fill)}")
        self.used.add(name)
        return self.fill[name]


def placeholders(value: dict[str, Any] | list[Any]) -> set[str]:
    """The names of all placeholders in the texts of a JSON value."""
    if b"{{" not in marshal.dumps(value, 0):  # one look at all texts is faster than one at each
        return set()
    names: set[str] = set()
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, (dict, list)):
            names |= placeholders(entry)
        elif isinstance(entry, str) and "{{" in entry:
            names.update(_PLACEHOLDER.findall(entry))
    return names
