"""A folder of drawn pictures, which an interrupted evaluation goes on to fill, with a mark of what they depend on."""

from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.strict_json import dumps, loads
from train.output_folder import make_writable


def begin(folder: Path, mark: Path, settings: dict[str, Any]) -> None:
    """Make the folder and its mark, a file; raise ValueError if it holds pictures of other settings.

    What is null, or was not there in an earlier version, is the same: off.
    """
    make_writable(folder)
    settings = loads(dumps(settings))  # as the mark reads back
    if mark.is_file():
        then, now = _without_nulls(loads(mark.read_text(encoding="utf-8"))), _without_nulls(settings)
        if changed := [key for key in now | then if now.get(key) != then.get(key)]:
            raise ValueError(
                f"output: {folder} holds pictures drawn with another value of {', '.join(changed)}; expected none, or "
                "the same to go on with. Choose another output, or remove that folder to draw them again"
            )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):  # a mark half written begins with a dot
        raise ValueError(f"output: {folder} is not empty, but {mark} is missing; expected both. Choose another output")
    write_durably(mark, dumps(settings, indent=1).encode())


def _without_nulls(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value is not None
    }
