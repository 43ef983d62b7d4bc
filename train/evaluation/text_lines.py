"""Text files of others, line by line."""

from collections.abc import Iterator
from pathlib import Path


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
