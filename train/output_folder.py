"""The output of a program that makes one thing: a folder that is absent, or complete for the settings its mark states.

The program works in `<output>.partial`, which it locks, and `commit` renames that; the mark file is written last and
repeats the settings, so that a second call can tell "done" from "made with other settings". A folder without our mark
is never touched.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from data.strict_json import dumps, loads
from train.checkpoints.folder_lock import LOCK_FILE, FolderLock


def make_writable(folder: Path) -> Path:
    """Make a folder to write into, unless it is there; raise OSError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output={folder}: cannot write there ({error.strerror}); choose a writable folder") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"output={folder}: cannot write there; choose a writable folder")
    return folder


class OutputFolder:
    """`path` as `program` fills it; `settings` (JSON values) decide what its contents are."""

    def __init__(self, path: str, program: str, mark: str, settings: dict[str, Any]) -> None:
        if not path:
            raise ValueError("output is empty: name the folder to write")
        self.path, self.program, self.mark = Path(path), program, mark
        self.settings = loads(dumps(settings))  # as the mark will read back
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._lock: FolderLock | None = None

    def is_complete(self) -> bool:
        """Return whether the folder holds this very thing; raise ValueError where it holds something not ours."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        mark = self.path / self.mark
        if not mark.is_file():
            raise ValueError(
                f"output={self.path}: exists and was not made by {self.program} (it has no {self.mark}); "
                "choose another folder or remove it"
            )
        try:
            made_with = loads(mark.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{mark}: not readable ({error!r}); remove {self.path} to make it again") from None
        if made_with == self.settings:
            return True
        changed = [key for key in self.settings | made_with if self.settings.get(key) != made_with.get(key)]
        print(f"{self.program}: {self.path} was made with another {', '.join(changed)}; making it again")
        return False

    def open_partial(self, *folders: str, keep: bool = False) -> Path:
        """Make and lock the folder to work in, with subfolders; clear what an interrupted run left, unless `keep`.

        Raises BlockingIOError if another process works in it, OSError where it cannot be written.
        """
        make_writable(self.partial)
        self._lock = self._lock or FolderLock(self.partial)
        for path in [] if keep else list(self.partial.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        for folder in folders:
            (self.partial / folder).mkdir(exist_ok=True)
        return self.partial

    def commit(self, summary: dict[str, Any]) -> None:
        """Write the mark with `summary` and put the finished folder in the place of whatever was there."""
        mark = {"settings": self.settings, **summary}
        (self.partial / self.mark).write_text(dumps(mark, indent=1) + "\n", encoding="utf-8")
        mode = (self.partial / self.mark).stat().st_mode & 0o777
        for file in self.partial.rglob("*"):  # safetensors writes for its owner alone
            if file.is_file():
                file.chmod(mode)
        old = self.path.with_name(self.path.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        if self.path.exists():
            os.replace(self.path, old)
        (self.partial / LOCK_FILE).unlink(missing_ok=True)
        os.replace(self.partial, self.path)
        shutil.rmtree(old, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
