"""A viewed run: which checkpoints are whole, which one a resume takes, what is in it to the last number (P5, P11)."""

import ctypes
import json
import math
import os
import pickle
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from xxhash import xxh3_64_hexdigest

from tests.ranks import run_ranks
from tests.runs import rows, saved_state
from train.checkpoints import checkpoint
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import Ranks, alone
from train.pages.checkpoint_listing import CheckpointListing
from train.pages.checkpoint_summary import CheckpointSummary
from train.pages.checkpoint_tables import view_checkpoints
from train.pages.terminal import View
from train.view import main

pytestmark = pytest.mark.usefixtures("one_thread")


def look(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return what the program prints."""
    capsys.readouterr()
    main([f"checkpoint={path}", *options])
    return capsys.readouterr().out


def look_at_json(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(look(path, capsys, "json=true"))


def table(view: View, title: str) -> list[dict[str, Any]]:
    return next(table.records() for table in view.tables if table.title == title)


@pytest.fixture
def run(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of a finished run on two ranks, saved at steps 20 and 24."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def newest(run: Path) -> Path:
    return checkpoint.saved(run / "checkpoints")[-1]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, its checksum too, as whoever writes checkpoints could."""
    (folder / name).write_bytes(content)
    listing = json.loads((folder / "checksums.json").read_text())
    listing["files"][name] = {"bytes": len(content), "xxh3": xxh3_64_hexdigest(content)}
    (folder / "checksums.json").write_text(json.dumps(listing))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_checkpoint_is_a_line_with_what_the_run_had_seen(
    undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged, seen = {row["step"]: row for row in rows(undisturbed)}, look_at_json(undisturbed, capsys)
    folders = checkpoint.saved(undisturbed / "checkpoints")
    for folder, line in zip(folders, seen["tables"]["checkpoints"], strict=True):
        row, files = logged[checkpoint.step_of(folder)], [f for f in folder.iterdir() if f.name != "checksums.json"]
        expected = {"step": row["step"], "tokens": row["tokens_seen"], "images": row["images_seen"], "ranks": 2}
        expected |= {"bytes": sum(file.stat().st_size for file in files), "whole": "yes", "kept": "last 2"}
        assert expected.items() <= line.items() and line["resume"] == ("from here" if row["step"] == 24 else "")
        assert line["age"].endswith((" s", " min"))
    assert "1, the last since" in seen["facts"]["attempts"]
    token = json.loads((undisturbed / "attempt.json").read_text())["token"]
    assert token not in json.dumps(seen) + look(undisturbed, capsys)


def test_damage_is_named_and_the_next_whole_checkpoint_is_the_one_a_resume_takes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P5: exactly what `latest` would choose, whatever was done to the newest."""
    root = run / "checkpoints"
    older, last = checkpoint.saved(root)
    pristine = shutil.copytree(last, tmp_path / "pristine")
    accidents = {
        "__0_0.distcp: 1000 bytes": lambda: os.truncate(last / "__0_0.distcp", 1000),
        "lanes.json: No such file": (last / "lanes.json").unlink,
        "checksums.json is damaged": lambda: (last / "checksums.json").write_text("{"),
        "index.json: xxh3": lambda: flip_a_bit(last / "index.json"),
        "__1_0.distcp: xxh3": lambda: flip_a_bit(last / "__1_0.distcp"),
    }
    for words, harm in accidents.items():
        shutil.rmtree(last)
        shutil.copytree(pristine, last)
        harm()
        listing = CheckpointListing.open(run).verified(int)
        assert listing.resumes.folder == older == checkpoint.latest(root, alone()), words
        assert [one.folder for one in listing.checkpoints if one.problems] == [last]
        assert any(problem.startswith(words) for problem in listing.checkpoints[-1].problems)
    seen = look_at_json(run, capsys)
    assert any(remark.startswith("step-00000024 is damaged: __1_0.distcp: xxh3") for remark in seen["remarks"])
    assert seen["facts"]["described"] == "step-00000020"
    assert main([f"checkpoint={run}"]) == 1 and main([f"checkpoint={older}"]) == 0
    flip_a_bit(older / "__0_0.distcp")
    view = view_checkpoints(run, verify=True)
    assert view.facts["resume"] == "refused: every checkpoint is damaged" and view.facts["step"] == 24
    assert re.search(r"step-00000024: \d+ tensors are not read: __1_0.distcp is damaged", " ".join(view.remarks))
    assert all(row["not read"] > 0 for row in table(view, "what it holds") if row["entry"] == "model")


def test_what_a_kill_left_behind_and_what_retention_removes_is_said(run: Path) -> None:
    """The view changes nothing: a run may be looked at while it trains."""
    root = run / "checkpoints"
    shutil.copytree(newest(run), root / "step-00000010")
    shutil.copytree(newest(run), root / ".tmp-step-00000029-3")
    before = sorted(run.rglob("*"))
    view = view_checkpoints(root, verify=True)
    kept = {row["step"]: row["kept"] for row in table(view, "checkpoints")}
    assert kept == {24: "last 2", 20: "last 2"} | dict.fromkeys(kept.keys() - {20, 24}, "to be removed")
    (leftover,) = table(view, "leftovers")
    assert leftover["folder"].endswith("checkpoints/.tmp-step-00000029-3") and leftover["bytes"] > 0
    assert leftover["what it is"].startswith("incomplete")
    assert sorted(run.rglob("*")) == before


def test_without_verification_nothing_is_called_whole(run: Path) -> None:
    """What cannot even be read is still named, tensor by tensor."""
    os.truncate(newest(run) / "__0_0.distcp", 1000)
    view = view_checkpoints(newest(run), verify=False)
    assert [row["whole"] for row in table(view, "checkpoints")] == ["not verified"]
    assert "if it verifies" in str(view.facts["resume"]) and not view.damaged
    assert any("model.text_embedding.weight cannot be read: RuntimeError" in remark for remark in view.remarks)


def test_every_number_is_that_of_the_saved_tensors(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a full load of the checkpoint."""
    seen = look_at_json(newest(undisturbed), capsys)
    tensors, lanes, meta = saved_state(undisturbed)
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        entry = name.split(".")[0]
        groups.setdefault(f"optimizer {name.split('.')[-1]}" if entry == "optimizer" else entry, []).append(tensor)
    entries = {row.pop("entry"): row for row in seen["tables"]["what it holds"]}
    assert groups.keys() == entries.keys() and {"model", "ema-7", "optimizer exp_avg_sq"} <= groups.keys()
    for entry, found in entries.items():
        flat = torch.cat([tensor.double().flatten() for tensor in groups[entry]])
        exact = {"tensors": len(groups[entry]), "elements": flat.numel(), "bytes": 4 * flat.numel()}
        assert (exact | {"dtype": "float32", "non-finite": 0, "not read": 0}).items() <= found.items()
        assert found["norm"] == pytest.approx(flat.norm().item(), rel=1e-6)
        assert found["largest"] == pytest.approx(flat.abs().max().item(), rel=1e-6)
        assert found["rms"] == pytest.approx(flat.square().mean().sqrt().item(), rel=1e-6)
    assert seen["facts"]["tokens seen"] == meta["progress"]["tokens_seen"]
    fingerprint = seen["tables"]["fingerprint: what must be the same on resume"]
    assert {row["name"]: row["value"] for row in fingerprint} == {k: str(v) for k, v in meta["fingerprint"].items()}
    config = {row["key"]: row["stored"] for row in seen["tables"]["config: differences from the defaults"]}
    assert config["optim.ema_half_lives"] == "[7]" and "optim.clip_norm" not in config
    packed = [lane["rows"] for lane in lanes.values()]
    assert seen["facts"]["lanes"] == f"{len(lanes)}, {min(packed)} to {max(packed)} sequences each"


def test_the_weights_with_extreme_values_are_listed(undisturbed: Path) -> None:
    weights = {name: t.double() for name, t in saved_state(undisturbed)[0].items() if name.startswith("model.")}
    rms = {name: tensor.square().mean().sqrt().item() for name, tensor in weights.items()}
    largest = {name: tensor.abs().max().item() for name, tensor in weights.items()}
    found = {row["tensor"]: row for row in table(view_checkpoints(newest(undisturbed), True), "extreme weights")}
    assert len(found) <= 9
    assert min(row["rms"] for row in found.values()) == pytest.approx(min(rms.values()), rel=1e-6)
    assert max(row["rms"] for row in found.values()) == pytest.approx(max(rms.values()), rel=1e-6)
    assert "largest value" in found[max(largest, key=largest.__getitem__)]["extreme in"]


def test_bad_weights_are_counted_and_named_and_left_out_of_the_sums(tmp_path: Path) -> None:
    tiny = torch.tensor([0.0, 1e-12, 0.5, -0.5, 3e4, float("nan"), float("-inf"), 0.0])
    weights = {"text_embedding.weight": tiny, "text_head.weight": torch.ones(3, 2, dtype=torch.bfloat16)}
    with RunFolder(tmp_path / "run", alone()) as run:
        state = {"model": weights, "ema-9": {"text_head.weight": torch.full((3, 2), 2.0)}}
        checkpoint.save(run, 7, state, {}, alone())
    view = view_checkpoints(tmp_path / "run", verify=True)
    assert "step-00000007: model.text_embedding.weight has 2 non-finite values" in view.remarks
    model = next(row for row in table(view, "what it holds") if row["entry"] == "model")
    assert model["dtype"] == "bfloat16 float32" and model["bytes"] == 8 * 4 + 6 * 2 and model["non-finite"] == 2
    assert model["norm"] == pytest.approx(math.sqrt(2 * 0.25 + 9e8 + 6)) and model["largest"] == 3e4
    said = " ".join(view.remarks)
    assert "meta.json" in said and "lanes.json" in said  # this checkpoint has none


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_nothing_executes_from_a_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P11: not its index, its config (an interpolation would read the environment) or control characters in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    folder = newest(run)
    config = (folder / "config.yaml").read_text().replace("device: cpu", "device: ${oc.env:SECRET}")
    rewrite(folder, "config.yaml", config.encode())
    rewrite(folder, "index.json", pickle.dumps(_Evil()))
    meta = json.loads((folder / "meta.json").read_text())
    meta["fingerprint"]["\x1b[2J"] = "\x07"
    rewrite(folder, "meta.json", json.dumps(meta).encode())
    text = look(folder, capsys)
    assert "index.json was not written by this trainer" in text and not (tmp_path / "executed").exists()
    assert "${oc.env:SECRET}" in text and "hunter2" not in text
    assert "\\x1b[2J" in text and all(line.isprintable() for line in text.splitlines())


TENSORS, TENSOR_MIB = 48, 8
M_MMAP_THRESHOLD = -3  # of malloc.h: larger blocks are mapped, and given back when they are freed


def _save(_: Ranks, run_dir: Path) -> list[Path]:
    large = {f"w{i}": torch.ones(TENSOR_MIB << 18) for i in range(TENSORS)}
    with RunFolder(run_dir, alone()) as run:
        return [
            checkpoint.save(run, step, {"model": weights}, {}, alone())
            for step, weights in enumerate(({"w": torch.ones(8)}, large))
        ]


def _peak_growth_mib(_: Ranks, small: Path, large: Path) -> tuple[float, float]:
    # glibc would put tensors of 8 MiB on its heap, whose gaps it keeps: by chance up to all of them.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20) == 1
    CheckpointSummary.read(small, set(), int)  # imports, and what reading takes in any case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contents = CheckpointSummary.read(large, set(), int)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return growth / 1024, contents.entries()["model"].norm


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """So that a checkpoint larger than memory can be looked at: 384 MiB here, in tensors of 8 and pieces of 4."""
    (folders,) = run_ranks(_save, 1, tmp_path / "run")
    ((growth, norm),) = run_ranks(_peak_growth_mib, 1, *folders)
    assert norm == pytest.approx(math.sqrt(TENSORS * TENSOR_MIB * 2**18))
    assert growth < 6 * TENSOR_MIB, "a tensor, its pieces in float, and the reader's buffer"


def test_where_no_checkpoint_is_the_refusal_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path, words in ((tmp_path / "none", "nothing there"), (tmp_path / "empty", "no checkpoint in it")):
        with pytest.raises(FileNotFoundError, match=f"{words}; expected a run_dir"):
            CheckpointListing.open(path)
