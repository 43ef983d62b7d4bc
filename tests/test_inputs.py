"""Inputs name files wherever they are; what names none is refused before work."""

import os
import tempfile
from pathlib import Path

import pytest

from data.inputs import expand
from data.remote import warn_once
from tests.servers import SOON, Server

TAR = (".tar",)


def test_files_folders_globs_and_braces_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.jsonl", "c.jsonl.gz", "stats.json", "sub/d.tar", "sub/sub/e.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()

    def names(*inputs: str, suffixes: tuple[str, ...] = (".tar", ".jsonl.gz")) -> str:
        found = expand([f"{tmp_path}/{name}" for name in inputs], suffixes)
        return " ".join(os.path.relpath(file, tmp_path) for file in found)

    assert names("") == "a.tar b.tar c.jsonl.gz"
    assert names("sub/d.tar", "a.tar") == "sub/d.tar a.tar"
    assert names("*", "sub") == "a.tar b.tar c.jsonl.gz sub/d.tar"
    assert names("[b-z].tar") == "b.tar"
    assert names("?.tar") == "a.tar b.tar"
    assert names("**/*.tar") == "a.tar b.tar sub/d.tar sub/sub/e.tar"
    assert names("{b,a}.tar", "sub/{sub/e,d}.tar") == "b.tar a.tar sub/sub/e.tar sub/d.tar"
    assert names("{a..b}.t*r") == "a.tar b.tar"
    assert names("", suffixes=(".jsonl",)) == "c.jsonl"
    assert expand([f"file://{tmp_path}/a.tar"], TAR) == [f"{tmp_path}/a.tar"]


def test_what_else_lies_in_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, memory) -> None:
    """By kind, count and example; a suffix may be of any case, and what file managers write is none of the files."""
    for name in ("b.tar", "C.TAR", "a.tar.gz", "d.parquet", "e.parquet", "._b.tar", "README", "new\nline.md"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "gone.tar").symlink_to("nowhere")
    found = [f"{tmp_path}/C.TAR", f"{tmp_path}/b.tar"]
    others = (
        "2 .parquet (such as 'd.parquet'), 2 that are no files (such as 'folder.tar/'), 1 file of macOS or "
        "Windows (such as '._b.tar'), 1 without suffix (such as 'README'), 1 .tar.gz (such as 'a.tar.gz') and 1 of "
        "other kinds"
    )
    for name in (str(tmp_path), f"{tmp_path}/*"):
        warn_once.cache_clear()
        caplog.clear()
        assert expand([name], TAR, quiet=True) == found and not caplog.messages
        assert expand([name], TAR) == found
        (message,) = caplog.messages
        if name == str(tmp_path):  # a glob leaves out hidden files itself
            assert message == f"input {name}: reading 2 files; left out, as none of .tar: {others}"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "new\nline.md").touch()
    with pytest.raises(ValueError, match=r"no .tar files in .*sub'\], but 1 .md \(such as 'new\\nline.md'\)$"):
        expand([f"{tmp_path}/sub"], TAR)
    memory.pipe("/x/a.Tar", b"1")
    memory.pipe("/x/sub/b.tar", b"1")
    caplog.clear()
    assert expand(["memory:///x"], TAR) == ["memory:///x/a.Tar"]
    assert "left out, as none of .tar: 1 that are no files (such as 'sub/')" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights")
def test_files_that_may_not_be_read_are_refused_before_work() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        for file, mode in (("a.tar", 0o644), ("b.tar", 0o600)):
            Path(name, file).touch(mode)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"1 files are not readable, such as '.*b.tar'; allow it"):
                expand([name], TAR)
        finally:
            os.seteuid(0)


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("a[1].tar", "{x,y}.tar", "*.tar", "b.tar", "open{.tar", "[z]/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert expand([f"{tmp_path}/{name}"], TAR) == [f"{tmp_path}/{name}"]
    assert expand([f"{tmp_path}/[z]"], TAR) == [f"{tmp_path}/[z]/1.tar"]


def test_remote_files_folders_and_globs_keep_their_protocol(memory, server: Server) -> None:
    for name in ("b.tar", "a.tar", "notes.md", "sub/c.tar"):
        memory.pipe(f"/x/{name}", b"1")
    found = ["memory:///x/a.tar", "memory:///x/b.tar"]
    assert expand(["memory:///x"], TAR) == expand(["memory:///x/*"], TAR) == found
    assert expand(["memory:///x/**/*.tar"], TAR) == [*found, "memory:///x/sub/c.tar"]
    assert expand(["memory:///x/{b,a}.tar"], TAR) == found[::-1]
    assert expand(["simplecache::memory:///x/a.tar"], TAR) == ["simplecache::memory:///x/a.tar"]
    server.files = {f"/d/{number:03}.tar": b"1" for number in range(12)}
    server.statuses.append(503)
    urls = [f"{server.url}/d/{number:03}.tar?key=v.txt" for number in range(12)]
    assert expand([f"{server.url}/d/{{000..011}}.tar?key=v.txt"], TAR, SOON) == urls


def test_inputs_that_are_no_files_are_refused(tmp_path: Path, memory, server: Server) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "sub.tar").mkdir()
    memory.pipe("/x/a.md", b"1")
    server.files["/a.md"] = b"1"
    missing = {
        f"{tmp_path}/none": "input .*none does not exist",
        f"{tmp_path}/{{none,nil}}.tar": "input .*/none.tar does not exist",
        f"{tmp_path}/*.tar": r"input .*\*.tar matches no file",
        "memory://x/none": "input memory://x/none does not exist",
        "memory://x/*.tar": r"input memory://x/\*.tar matches no file",
        f"{server.url}/none.tar?token=secret": r"input http://.*/none.tar\?… does not exist$",
    }
    for name, message in missing.items():
        with pytest.raises(FileNotFoundError, match=message) as caught:
            expand([name], TAR, SOON)
        assert "secret" not in str(caught.value)
    (tmp_path / "gone.tar").symlink_to("nowhere")
    refused = {
        os.devnull: "null: expected a file or folder, found a device, a pipe or a broken link",
        f"{tmp_path}/gone.tar": "gone.tar: expected a file or folder, found a device, a pipe or a broken link",
        f"{tmp_path}/a.parquet": "a.parquet: expected one of .tar, .txt, or a folder of them",
        f"{server.url}/a.md": "a.md: expected one of .tar, .txt, or a folder of them",
        "memory://x/a.md": "a.md: expected one of .tar, .txt, or a folder of them",
        str(tmp_path): r"no .tar, .txt files in \['.*'\]",
        f"{tmp_path}/*.par*": r"no .tar, .txt files in \['.*'\]",
        "memory://x": r"no .tar, .txt files in \['memory://x'\]",
        f"{server.url}/": "lists no files; name them, with braces",
        f"{server.url}/*.tar": "lists no files; name them, with braces",
        f"{tmp_path}/{{a": "braces do not match",
        "simplecache::memory://x/*.md": "chain of URLs cannot be listed",
        "pipe:cat a.tar": "commands are not run",
        "pipe:curl http://h/a.tar": "commands are not run",
        "pipe::http://h/a.tar": "Protocol not known: pipe; expected a local path",
        "nothing://h/a.tar": "Protocol not known: nothing; expected a local path",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            expand([name], (".tar", ".txt"), SOON)
    with pytest.raises(ValueError, match=r"no .tar files in inputs=\[\] \(none given\)"):
        expand([], TAR)


def test_a_file_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    memory.pipe("/x/a.tar", b"1")
    for inputs in (["a.tar", "./a.tar"], ["*.tar", str(tmp_path)], ["{a,a}.tar"], ["memory:///x", "memory:///x/a.tar"]):
        with pytest.raises(ValueError, match=r"a.tar is named 2 times, expected once"):
            expand(inputs, TAR)
