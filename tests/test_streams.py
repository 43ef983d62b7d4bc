"""Output may be cut off and names may be anything, in any locale: programs end properly, and no work is lost."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.runs import rows, saved_steps, settings
from tests.say import say

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "model", "train", "slurm", "bench")
NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def cut_pipe() -> int:
    """Return the writing end of a pipe without a reader."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("arguments", [("--help",), ("--resolve",), ("name=said", "times=100000")])
def test_a_program_whose_output_is_cut_ends_quietly_with_the_status_of_sigpipe(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert say(tmp_path, *arguments, stdout=cut_pipe()) == (141, "", "")
    assert not (tmp_path / "said").exists()


def test_lasting_work_goes_on_without_a_reader_and_on_a_full_disk(tmp_path: Path) -> None:
    """P13. Other programs report that the disk is full."""
    for name, stdout in (("cut", cut_pipe()), ("full", Path("/dev/full"))):
        assert say(tmp_path, f"name={name}", "times=100000", stdout=stdout, LASTING="") == (0, "", "")
        assert (tmp_path / name).read_text() == name
    refused = (2, "", "train.say: [Errno 28] No space left on device\n")
    assert say(tmp_path, "name=x", stdout=Path("/dev/full")) == refused
    assert say(tmp_path, "--resolve", stdout=Path("/dev/full"), LASTING="") == refused


@pytest.mark.parametrize("locale", [NO_UTF8, {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}])
def test_in_any_locale_a_name_is_the_same_and_what_cannot_be_printed_is_escaped(
    tmp_path: Path, locale: dict[str, str]
) -> None:
    config, printed = tmp_path / "c.yaml", tmp_path / "printed"
    config.write_text("name: été\n", encoding="utf-8")
    assert say(tmp_path, f"config={config}", stdout=printed, **locale) == (0, "", "")
    assert (tmp_path / "été").read_text(encoding="utf-8") == "été" and printed.read_bytes() == b"\\xe9t\\xe9\n"
    assert say(tmp_path, "name=größe", stdout=printed, **locale) == (0, "", "")
    assert (tmp_path / "größe").read_text(encoding="utf-8") == "größe"
    assert say(tmp_path, f"config={config}", "--resolve", stdout=tmp_path / "resolved", **locale) == (0, "", "")
    assert (tmp_path / "resolved").read_text(encoding="utf-8").startswith("name: été\n")  # for programs: always UTF-8


def test_a_training_whose_output_is_cut_ends_whole_at_home_in_a_folder_of_any_name(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P13: nobody reads either stream of a real training."""
    argv = settings(Path("~/été"), tokenizer, sources, optim__steps=2)
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train.pretrain", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=cut_pipe(), stderr=cut_pipe(), timeout=120)
    assert done.returncode == 0
    assert saved_steps(tmp_path / "été") == [2] and rows(tmp_path / "été")[-1]["step"] == 2


def sources_of(*packages: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(path for package in packages for path in (ROOT / package).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_every_program_opens_its_streams_so() -> None:
    """Except those that only become another program."""
    for path, tree in sources_of("train", "slurm", "bench"):
        for node in tree.body:
            if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
                opens = any(name in ast.unparse(node) for name in ("run_program", "open_streams"))
                assert opens or path.parts[-2:] in (("slurm", "task.py"), ("bench", "first_step.py")), path


def test_every_text_file_is_opened_as_utf8() -> None:
    for path, tree in sources_of(*PACKAGES):
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            is_text = name in ("read_text", "write_text") or (
                name in ("open", "fdopen", "NamedTemporaryFile") and any(set(mode) <= set("rwax+t") for mode in modes)
            )
            names_it = any(keyword.arg == "encoding" for keyword in node.keywords)
            assert names_it or not is_text, f"{path}:{node.lineno}: {ast.unparse(node)}"
