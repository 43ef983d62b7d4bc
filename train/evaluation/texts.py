"""Reading what others wrote: lines of text, and JSON whose form is not what the code that reads it expects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What code raises that meets JSON of another form: a list for an object, a name for a number, an endless one.
OTHER_FORM = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a UTF-8 file that is not blank.

    A newline ends a line, nothing else: texts in JSON may hold U+2028 and U+0085, at which str.splitlines cuts. Raises
    FileNotFoundError, or ValueError for another encoding.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected lines of text or JSON (docs/evaluation.md)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); expected text, convert it with iconv") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def text_of(value: Any) -> str:
    """Return a value of JSON that must be a text; raise TypeError for another, ValueError for half a surrogate pair."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]} is no text")
    value.encode()  # UnicodeEncodeError is a ValueError
    return value
