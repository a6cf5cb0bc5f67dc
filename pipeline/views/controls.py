"""Text of data, models and libraries that must not command the terminal."""

import re

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters that a terminal would obey: all but tab and newline."""


def without_controls(text: str) -> str:
    """The text with escapes such as `\\x1b` in place of control characters."""
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
