"""JSON that any reader reads: a number that is not finite, which JSON does not have, is written as null.

Its object says beside it what it was, {"loss": null, "not_finite": {"loss": "nan"}}, as null alone means that there is
none; `loads` puts it back, so that our own readers see what was written. Rejected: Python's NaN and Infinity, which
other languages' readers refuse; texts in place of the numbers, as they would make texts of a column of numbers.
"""

import json
import math
from typing import Any

NOT_FINITE = "not_finite"
_WORDS = ("nan", "inf", "-inf")


def dumps(value: Any, **options: Any) -> str:
    """Return what json.dumps does, with null for each number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # there is one
        return json.dumps(finite(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Return what was given to `dumps`, but for numbers in lists, which stay null."""
    return json.loads(text, object_hook=_restored)


def finite(value: Any) -> Any:
    """Return a value of JSON without numbers that are not finite."""
    if isinstance(value, dict):
        lost = {name: str(float(one)) for name, one in value.items() if _is_lost(one)}
        kept = {name: finite(one) for name, one in value.items()}
        return {**kept, NOT_FINITE: lost} if lost else kept
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if _is_lost(value) else value


def _restored(read: dict[str, Any]) -> dict[str, Any]:
    lost = read.get(NOT_FINITE)
    if not isinstance(lost, dict) or not all(word in _WORDS for word in lost.values()):
        return read
    del read[NOT_FINITE]
    return read | {name: float(word) for name, word in lost.items()}


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
