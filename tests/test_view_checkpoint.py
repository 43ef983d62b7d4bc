"""A viewed run: which checkpoints are whole, which one a resume takes, what is in it to the last number (P5, P11)."""

import json
import math
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_64_hexdigest

from tests.pages import Page
from tests.ranks import run_ranks
from tests.runs import rows, saved_state
from train.checkpoints import checkpoint
from train.checkpoints.run_folder import RunFolder
from train.config import load_config
from train.distributed.ranks import Ranks, alone
from train.pages.checkpoint_listing import CheckpointListing
from train.pages.checkpoint_page import view_checkpoints
from train.pages.checkpoint_summary import CheckpointSummary, magnitude_edges, summarize
from train.planning.estimate import parameters
from train.pretrain_config import PretrainConfig
from train.view import main

pytestmark = pytest.mark.usefixtures("one_thread")


def look(path: Path, output: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, Page]:
    """Return what a terminal shows, and the page."""
    main([f"checkpoint={path}", f"output={output}", *options])
    return capsys.readouterr().out, Page((output / "index.html").read_text())


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


# ---- the run's list ----


def test_each_checkpoint_is_a_line_with_what_the_run_had_seen(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, page = look(undisturbed, tmp_path, capsys)
    logged = {row["step"]: row for row in rows(undisturbed)}
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for folder in checkpoint.saved(undisturbed / "checkpoints"):
        row, files = logged[checkpoint.step_of(folder)], [f for f in folder.iterdir() if f.name != "checksums.json"]
        cells = re.split(r"  +", lines[str(row["step"])])
        size = f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"
        assert cells[2:7] == [size, f"{row['tokens_seen']:,}", f"{row['images_seen']:,}", "2", "yes"]
    assert set(map(str, (20, 24))) < lines.keys() and "from here" in lines["24"] and "from here" not in lines["20"]
    assert "1, the last since" in page.fact("attempts")
    token = json.loads((undisturbed / "attempt.json").read_text())["token"]
    assert token not in text + page.html
    assert page.unbalanced == [] and page.open == [] and page.html.count("<svg") == 6
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "form")]


def test_damage_is_named_and_the_next_whole_checkpoint_is_the_one_a_resume_takes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P5: exactly what `latest` would choose, whatever was done to the newest; the view goes on with what is whole."""
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
    text, page = look(run, tmp_path / "out", capsys)
    assert "step-00000024 is damaged: __1_0.distcp: xxh3" in text and page.fact("described") == "step-00000020"
    assert main([f"checkpoint={run}", f"output={tmp_path / 'out'}"]) == 1
    assert main([f"checkpoint={older}", f"output={tmp_path / 'out'}"]) == 0
    flip_a_bit(older / "__0_0.distcp")
    text, page = look(run, tmp_path / "out", capsys)
    assert page.fact("resume") == "refused: every checkpoint is damaged" and page.fact("step") == "24"
    assert re.search(r"step-00000024: \d+ tensors are not read: they lie in __1_0.distcp", text)
    assert "not read" in page.section("entries").text


def test_what_a_kill_left_behind_and_what_retention_removes_is_said(run: Path) -> None:
    """The view changes nothing: a run may be looked at while it trains."""
    root = run / "checkpoints"
    shutil.copytree(newest(run), root / "step-00000010")
    shutil.copytree(newest(run), root / ".tmp-step-00000029-3")
    before = sorted(run.rglob("*"))
    seen = view_checkpoints(root, verify=True)
    kept = {Path(one["folder"]).name: one["kept"] for one in seen.record["checkpoints"]}
    assert kept == {"step-00000010": False, "step-00000020": True, "step-00000024": True}
    tables = {title: table.text() for title, table in seen.tables}
    assert "to be removed" in tables["checkpoints"] and ".tmp-step-00000029-3" in tables["leftovers"]
    assert seen.record["leftovers"][0]["num_bytes"] > 0 and "half-written" in seen.record["leftovers"][0]["meaning"]
    assert sorted(run.rglob("*")) == before


def test_without_verification_nothing_is_called_whole(run: Path) -> None:
    """What cannot even be read is still named, tensor by tensor."""
    os.truncate(newest(run) / "__0_0.distcp", 1000)
    seen = view_checkpoints(newest(run), verify=False)
    assert [one["problems"] for one in seen.record["checkpoints"]] == [None]
    (_, table), *_ = seen.tables
    assert "not verified" in table.text() and "yes" not in table.text() and "if it verifies" in seen.facts["resume"]
    assert any("model.text_embedding.weight cannot be read: RuntimeError" in remark for remark in seen.remarks)


# ---- one checkpoint ----


def test_every_number_is_that_of_the_saved_tensors(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a full load of the checkpoint, and the model's own count of parameters by part."""
    main([f"checkpoint={newest(undisturbed)}", f"output={tmp_path}", "json=true"])
    contents = json.loads(capsys.readouterr().out)["contents"]
    tensors, lanes, meta = saved_state(undisturbed)
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        entry = name.split(".")[0]
        groups.setdefault(f"optimizer {name.split('.')[-1]}" if entry == "optimizer" else entry, []).append(tensor)
    assert groups.keys() == contents["entries"].keys() and {"model", "ema-7", "optimizer exp_avg_sq"} <= groups.keys()
    for entry, found in contents["entries"].items():
        flat = torch.cat([tensor.double().flatten() for tensor in groups[entry]])
        assert found["tensors"] == len(groups[entry]) and found["measured"] == found["elements"] == flat.numel()
        assert found["norm"] == pytest.approx(flat.norm().item(), rel=1e-6)
        assert found["largest"] == pytest.approx(flat.abs().max().item(), rel=1e-6)
        assert found["rms"] == pytest.approx(flat.square().mean().sqrt().item(), rel=1e-6)
        assert found["nonfinite"] == 0 and found["dtypes"] == ["float32"]
    config = load_config(PretrainConfig, [f"config={undisturbed / 'config.yaml'}"])
    vocab_size = len(tensors["model.text_head.weight"])
    counted = parameters(config.model, vocab_size)
    assert {part: found["elements"] for part, found in contents["parts"].items()} | {
        "total": contents["entries"]["model"]["elements"]
    } == counted
    assert contents["fingerprint"] == meta["fingerprint"] and contents["progress"] == meta["progress"]
    assert contents["config"]["optim.ema_half_lives"] == [7] and "optim.clip_norm" not in contents["config"]
    assert contents["lanes"]["lanes"] == len(lanes) and sum(s["pending"] for s in contents["lanes"]["sources"]) == sum(
        len(state["pending"]) for state in lanes.values()
    )


def _tensors() -> checkpoint.State:
    tiny = torch.tensor([0.0, 1e-12, 0.5, -0.5, 3e4, float("nan"), float("-inf"), 0.0])
    weights = {"text_embedding.weight": tiny, "text_head.weight": torch.ones(3, 2, dtype=torch.bfloat16)}
    return {"model": weights, "ema-9": {"text_head.weight": torch.full((3, 2), 2.0)}, "optimizer": {}}


def test_bad_weights_are_counted_and_named_and_left_out_of_the_sums(
    tmp_path: Path,
) -> None:
    """Zeros are no magnitude; what lies beyond the histogram's range counts at its ends."""
    state = {name: part for name, part in _tensors().items() if part}
    with RunFolder(tmp_path / "run", alone()) as run:
        folder = checkpoint.save(run, 7, state, {}, alone())
    seen = view_checkpoints(tmp_path / "run", verify=True)
    assert seen.record["contents"]["nonfinite"] == {"model.text_embedding.weight": 2}
    assert "step-00000007: model.text_embedding.weight has 2 non-finite values" in seen.remarks
    model = seen.record["contents"]["entries"]["model"]
    assert model["dtypes"] == ["bfloat16", "float32"] and model["num_bytes"] == 8 * 4 + 6 * 2
    assert model["norm"] == pytest.approx(math.sqrt(2 * 0.25 + 9e8 + 6)) and model["largest"] == 3e4
    contents = CheckpointSummary.read(folder, set(), int)
    sums = contents.sums(lambda tensor: tensor.part)["embeddings"]
    filled = {f"{magnitude_edges()[i]:.2g}": n for i, n in enumerate(sums.histogram.tolist()) if n}
    assert filled == {"1e-08": 1, "0.42": 2, "75": 1} and sums.zeros == 2
    said = " ".join(seen.remarks)
    assert "meta.json" in said and "lanes.json" in said  # this checkpoint has none, and the view goes on


def test_lanes_are_summed_up_by_source(tmp_path: Path) -> None:
    states = [
        {"rows": 3, "cursors": [[0, 5, 70], [2, 1, 30]], "pending": [[0, 0, 0, 1, 0]], "skipped": {"a": 2},
         "skipped_names": ["a: x#1"]},
        {"rows": 4, "cursors": [[1, 0, 60], [2, 2, 50]], "pending": [[1, 2, 0, 1, 0], [0, 1, 0, 0, 9]],
         "skipped": {"a": 1, "b": 1}, "skipped_names": ["b: y#2"]},
    ]  # fmt: skip
    lanes = summarize(states, ["pictures"])
    assert [(s.name, s.epochs, s.tokens, s.pending) for s in lanes.sources] == [
        ("pictures", (0, 0.5, 1), 130, 2),
        ("source 1", (2, 2.0, 2), 80, 1),
    ]
    assert lanes.rows == (3, 4) and lanes.skipped == {"a": 3, "b": 1}
    assert lanes.skipped_names == ["a: x#1", "b: y#2"]


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_nothing_executes_from_a_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P11: not its index, not its config (an interpolation would read the environment), not what it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    folder = newest(run)
    config = (folder / "config.yaml").read_text().replace("device: cpu", "device: ${oc.env:SECRET}")
    rewrite(folder, "config.yaml", config.encode())
    rewrite(folder, "index.json", pickle.dumps(_Evil()))
    meta = json.loads((folder / "meta.json").read_text())
    meta["fingerprint"]["<script>alert(1)</script>"] = "<img src=x onerror=alert(1)>"
    rewrite(folder, "meta.json", json.dumps(meta).encode())
    text, page = look(folder, tmp_path / "out", capsys)
    assert "index.json was not written by this trainer" in text and not (tmp_path / "executed").exists()
    assert "${oc.env:SECRET}" in page.section("config").text and "hunter2" not in text + page.html
    assert "<script>alert(1)</script>" in page.text and "script" not in {tag for tag, _ in page.elements}
    assert "img" not in {tag for tag, _ in page.elements}


TENSORS, TENSOR_MIB = 48, 8


def _save(_: Ranks, run_dir: Path) -> list[Path]:
    large = {f"w{i}": torch.ones(TENSOR_MIB << 18) for i in range(TENSORS)}
    with RunFolder(run_dir, alone()) as run:
        return [
            checkpoint.save(run, step, {"model": weights}, {}, alone())
            for step, weights in enumerate(({"w": torch.ones(8)}, large))
        ]


def _peak_growth_mib(_: Ranks, small: Path, large: Path) -> tuple[float, float]:
    CheckpointSummary.read(small, set(), int)  # imports, and what reading takes in any case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contents = CheckpointSummary.read(large, set(), int)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return growth / 1024, contents.sums(lambda tensor: tensor.entry)["model"].norm


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """So that a checkpoint larger than memory can be looked at: 384 MiB here, in tensors of 8 and pieces of 4."""
    (folders,) = run_ranks(_save, 1, tmp_path / "run")
    ((growth, norm),) = run_ranks(_peak_growth_mib, 1, *folders)
    assert norm == pytest.approx(math.sqrt(TENSORS * TENSOR_MIB * 2**18))
    assert growth < TENSORS * TENSOR_MIB / 2, "what the allocator keeps for itself included"


def test_where_no_checkpoint_is_the_refusal_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path, words in ((tmp_path / "none", "nothing there"), (tmp_path / "empty", "no checkpoint in it")):
        with pytest.raises(FileNotFoundError, match=f"{words}; expected a run_dir"):
            CheckpointListing.open(path)
    for arguments in ([], [f"checkpoint={tmp_path}", f"shards={tmp_path}"]):
        with pytest.raises(ValueError, match="expected exactly one of them"):
            main(arguments)
