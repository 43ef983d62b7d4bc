"""Reading what others wrote: lines of text, and JSON whose form is not what the code that reads it expects."""

from pathlib import Path
from typing import Any

# What code raises that meets JSON of another form: a list for an object, a name for a number, an endless one.
OTHER_FORM = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file; raise ValueError unless it is UTF-8.

    A line ends at a line feed alone: JSON may hold U+2028 and other characters at which `splitlines` would cut it.
    """
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8 ({error})") from None


def text_of(value: Any) -> str:
    """Return a value of JSON that must be a text; raise TypeError for another, ValueError for half a surrogate pair."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]} is no text")
    value.encode()  # UnicodeEncodeError is a ValueError
    return value
