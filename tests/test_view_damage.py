"""What train.view says of a data set that is damaged."""

import re
import shutil
from pathlib import Path

import pytest

from tests.test_view import Seen

pytestmark = pytest.mark.usefixtures("one_thread")


def test_counts_are_shown_where_no_record_can_be_read(
    pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    for path in data.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    seen = Seen(capsys, data, tmp_path / "out", n=5)
    assert seen.bad == {"checksum": 5} and not seen.documents
    assert (
        seen.facts["documents"] == 60
        and seen.tables["tokens a document"][0]["tokens"] == "all"
        and not (tmp_path / "out").exists()
    )


def test_a_cut_or_lost_shard_is_named(pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    with (data / "00000.tar").open("r+b") as file:
        file.truncate(5000)
    (data / "00002.tar").unlink()
    seen = Seen(capsys, data, tmp_path / "out", n=60)
    assert seen.bad == {"missing shard": 1, "shard of another size": 1, "truncated": 30, "unreadable shard": 22}
    assert f"{data}/00002.tar: missing shard" in seen.text and "00000.tar: shard of another size (5000" in seen.text
    assert re.search(r"Missing or damaged: \d+ more", seen.text)  # than are named
    assert seen.facts["longer than 4,096"] == "0 documents, 0 with images"
