"""What a file is by its first bytes, if its name promises something else: only for messages."""

import re

HEAD_BYTES = 512  # enough to tell
LFS_POINTER = "a Git LFS pointer: fetch the file itself with `git lfs pull`"

_SIGNATURES = (  # (first bytes, what has them)
    (rb"version https://git-lfs", LFS_POINTER),
    (rb"(?i)\s*<(?:!doctype html|html|head)", "an HTML page, sent by a server in place of the file"),
    (rb"\s*<\?xml|\s*<Error>", "an XML page, sent by an object store in place of the file"),
    (rb"\x1f\x8b", "gzip"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd"),
    (rb"BZh[1-9]1AY&SY", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (rb"PAR1", "a Parquet file"),
    (rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP|GIF8", "a picture"),
    (rb"\s*[{\[]", "JSON"),
)


def looks_like(head: bytes) -> str | None:
    """Describe a file that begins with `head`, None without a known signature."""
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "nothing but zeros"
    return next((what for pattern, what in _SIGNATURES if re.match(pattern, head, re.DOTALL)), None)
