"""The files that a config's `inputs` name: files, folders, globs and braces, local or behind URLs.

Names are strings, for a URL is no path. Found and checked before any work starts.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic

from data.remote import (
    RETRIES,
    Retries,
    file_info,
    filesystem,
    is_http,
    is_remote,
    local_name,
    retried,
    shown,
    warn_once,
    without_query,
)
from data.tar import left_out

_ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_OF_ROWS = (".jpg", ".jpeg", ".png", ".webp", "/")  # pictures, and folders of them, that rows beside them may name
LISTERS = 16  # threads that ask for thousands of URLs


def expand(
    inputs: Sequence[str], suffixes: tuple[str, ...], retries: Retries = RETRIES, quiet: bool = False
) -> list[str]:
    """Return the files that inputs name: files, folders (their direct files), globs, braces; local or URLs.

    Folders and globs give the files with one of the suffixes (ignoring case), sorted; unless `quiet`, a warning lists
    what else is there. A local name that exists is no pattern.
    Raises FileNotFoundError for what is missing, PermissionError for what is not readable, ValueError for a file of
    another kind or named twice, for a folder without any, and for what cannot be listed or is no file.
    """
    from braceexpand import braceexpand

    names: list[str] = []
    for name in inputs:
        exists = not is_remote(name) and os.path.exists(local_name(name))
        try:
            names += [name] if exists else braceexpand(name, escape=False)
        except ValueError:
            raise ValueError(f"input {shown(name)}: braces do not match; expected {{00000..00099}} or alike") from None
    with ThreadPoolExecutor(LISTERS) as pool:  # there may be thousands of URLs
        found = list(pool.map(lambda name: _files_of(name, suffixes, retries, quiet), names))
    files = [file for some in found for file in some]
    if not files:
        raise ValueError(f"no {', '.join(suffixes)} files in inputs=[] (none given)")
    file, count = Counter(file if is_remote(file) else os.path.abspath(file) for file in files).most_common(1)[0]
    if count > 1:
        raise ValueError(f"input {shown(file)} is named {count} times, expected once; name each file in one way only")
    return files


def _files_of(name: str, suffixes: tuple[str, ...], retries: Retries, quiet: bool) -> list[str]:
    """Return the files that one input names, braces expanded."""
    kinds, what = ", ".join(suffixes), f"input {shown(name)}"
    if is_remote(name):
        found = retried(lambda: _list_remote(name, what, retries.stall_s), what, retries)
    else:
        found = _list_local(name := local_name(name), what)
    if found is None:
        kept = [name]
        if not without_query(name).lower().endswith(suffixes):
            raise ValueError(f"{what}: expected one of {kinds}, or a folder of them")
    else:
        kept = [file for file in found if file.lower().endswith(suffixes) and left_out(file) is None]
        named = _OF_ROWS if any(file.lower().endswith(_ROWS) for file in kept) else ()
        others = _others(file for file in set(found) - set(kept) if not file.lower().endswith(named))
        if not kept:
            raise ValueError(f"no {kinds} files in {[shown(name)]}" + (f", but {others}" if others else ""))
        if others and not quiet:
            warn_once(f"{what}: reading {len(kept)} files; left out, as none of {kinds}: {others}")
    as_who = {"effective_ids": os.access in os.supports_effective_ids}
    forbidden = [] if is_remote(name) else [file for file in kept if not os.access(file, os.R_OK, **as_who)]
    if forbidden:
        raise PermissionError(f"{what}: {len(forbidden)} files are not readable, such as {forbidden[0]!r}; allow it")
    return kept


def _others(names: Iterable[str]) -> str:
    """Describe names: how many of each kind, with an example. A folder's name ends in a slash."""
    kinds: dict[str, list[str]] = {}
    for base in sorted(name.rstrip("/").rpartition("/")[2] + "/" * name.endswith("/") for name in names):
        suffix = re.search(r"[^.]((?:\.tar)?\.[^.]+)$", base.lower())
        kind = left_out(base) or (suffix[1] if suffix else "without suffix")
        kinds.setdefault("that are no files" if base.endswith("/") else kind, []).append(base)
    most = sorted(kinds.items(), key=lambda item: -len(item[1]))
    said = [f"{len(some)} {kind} (such as {some[0]!r})" for kind, some in most[:5]]
    return ", ".join(said) + (f" and {sum(len(some) for _, some in most[5:])} of other kinds" if most[5:] else "")


def _list_local(name: str, what: str) -> list[str] | None:
    """Return what a folder or glob holds, None for a file; names of what is no file end in a slash."""
    if os.path.isfile(name):
        return None
    if os.path.isdir(name):
        return sorted(entry.path + "/" * (not entry.is_file()) for entry in os.scandir(name))
    if os.path.lexists(name):
        raise ValueError(f"{what}: expected a file or folder, found a device, a pipe or a broken link")
    if not has_magic(name):
        raise FileNotFoundError(f"{what} does not exist")
    found = sorted(file.rstrip("/") + "/" * (not os.path.isfile(file)) for file in glob(name, recursive=True))
    if all(file.endswith("/") for file in found):
        raise FileNotFoundError(f"{what} matches no file")
    return found


def _list_remote(name: str, what: str, stall_s: float) -> list[str] | None:
    """The same for a URL."""
    if is_http(name):
        path = without_query(name)
        if path.endswith("/") or "*" in path:
            raise ValueError(f"{what}: a web server lists no files; name them, with braces such as {{00000..00099}}")
        file_info(name, stall_s)
        return None
    files, path = filesystem(name)
    if has_magic(path):
        files.invalidate_cache()
        if not (entries := files.glob(path, detail=True).values()):
            raise FileNotFoundError(f"{what} matches no file")
    elif file_info(name, stall_s)["type"] != "directory":
        return None
    else:
        entries = files.ls(path, detail=True)
    if "::" in name:
        raise ValueError(f"{what}: files in a chain of URLs cannot be listed; name each, with braces")
    return sorted(files.unstrip_protocol(e["name"]).rstrip("/") + "/" * (e["type"] != "file") for e in entries)
