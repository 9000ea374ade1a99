"""Text from outside, made fit for a terminal and for logs of one line an event."""

from __future__ import annotations

import re

# Control characters (a newline forges a line of a log, an escape commands the terminal), Unicode's
# line ends, the marks that turn the direction of writing, and halves of surrogate pairs.
UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with what is not to be printed written as escapes, such as `\\n` and `\\x1b`."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
