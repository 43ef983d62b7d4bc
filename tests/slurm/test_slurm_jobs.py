"""Arrays, chains and the batch scripts, on a real Slurm."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from slurm.options import LaunchConfig
from slurm.signal_delay import warnings
from tests.encoding.jobs import arguments, contents_of, picture_record, raw_folder
from tests.runs import DrawingRun, assert_same_end, settings
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.launched import ROOT, attempts, launch, processes, tail, training, wait_for_step

pytestmark = pytest.mark.slurm
SMALL_VAE = ["model.latent_channels=2", "model.block_channels=[8,8,8]", "model.layers_per_block=1"]
SMALL_VAE += ["model.norm_groups=4", "model.mid_attention=false"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve raw shards of 40 pictures."""
    shards = {f"{i:02d}": [picture_record(40 * i + j) for j in range(40)] for i in range(12)}
    return raw_folder(tmp_path_factory.mktemp("raw") / "pictures", shards)


def test_an_array_whose_task_is_killed_ends_complete_and_verified(
    cluster: Cluster, tmp_path: Path, raw: Path, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    """P7: the killed element is requeued, the others take over its file; then the same bytes as one worker's."""
    output = tmp_path / "latents"
    options = {"vae": vae_folder, "batch_size": 1, "lease_timeout_s": 3}
    argv = arguments(raw, output, tokenizer, **options)
    (job_id, check), printed = launch(
        "program=train.encode", "array=3%2", *argv, "then=train.encode", f"verify={output}"
    )
    assert "3 elements of 1 task, at most 2 at once" in printed
    jobs = tmp_path / "latents.slurm"
    wait_for(lambda: any(output.glob("*.tar.json")), 60, lambda: tail(jobs / f"{job_id}_0.log"))
    os.kill(max(processes("train.encode")), signal.SIGKILL)
    assert cluster.wait(check, timeout_s=120) == "COMPLETED"
    assert "3 elements" not in tail(jobs / f"{job_id}_0.log") and set(cluster.history(job_id)) == {
        "REQUEUED",
        "COMPLETED",
    }
    ended = [attempts(jobs, f"{job_id}_{element}") for element in range(3)]
    assert sorted(a["status"] for element in ended for a in element) == [0, 0, 0, 137]
    assert "12 shards" in tail(jobs / f"{check}.log")
    subprocess.run(
        [ROOT / ".venv/bin/python", "-m", "train.encode", *arguments(raw, tmp_path / "alone", tokenizer, **options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    assert contents_of(output) == contents_of(tmp_path / "alone")


def test_a_partition_that_preempts_too_fast_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """P6: its grace is Slurm's to say."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stop_s": 20.0}\n')
    for partition, warned in (("scavenge", 1), ("main", 0), ("nosuch", 0)):
        lines = warnings({"run_dir": str(tmp_path)}, None, LaunchConfig(sbatch={"partition": partition}))
        assert len(lines) == warned and all("partition scavenge gives GraceTime=15 s" in line for line in lines)


def questions(folder: Path) -> Path:
    """Write something that any model can be scored on."""
    path = folder / "questions.jsonl"
    path.write_text(json.dumps({"context": "a circle is", "choices": ["red", "square"], "answer": 0}) + "\n")
    return path


def test_a_chain_of_programs_is_one_command(cluster: Cluster, tmp_path: Path, raw: Path, tokenizer: Tokenizer) -> None:
    """From raw pictures to an evaluated model; each job starts when the one before is done."""
    words = settings(
        tmp_path / "run",
        tokenizer,
        {"pairs": tmp_path / "latents"},
        optim__steps=3,
        data__tokenizer=tmp_path / "t.model",
        data__sequence_length=128,
        vae=tmp_path / "vae",
    )
    ids, printed = launch(
        "program=train.tokenizer", f"inputs=[{raw}]", f"output={tmp_path}/t.model", "vocab_size=300",
        "then=train.vae", f"inputs=[{raw}]", f"output={tmp_path}/vae", "resolution=32", "batch_size=8", "optim.steps=2",
        "device=cpu", *SMALL_VAE,
        "then=train.encode", f"inputs=[{raw}]", f"output={tmp_path}/latents", f"tokenizer={tmp_path}/t.model",
        f"vae={tmp_path}/vae", "resolution=32", "array=2", "device=cpu",
        "then=train.pretrain", *words, "nodes=2",
        "then=train.evaluate", "device=cpu", f"checkpoint={tmp_path}/run", f"output={tmp_path}/evaluation",
        f"choices.colours={questions(tmp_path)}",
    )  # fmt: skip
    assert len(ids) == 5 and printed.count("  watch ") == 5
    assert cluster.wait(ids[-1], timeout_s=180) == "COMPLETED"
    assert [set(cluster.history(job_id)) for job_id in ids] == [{"COMPLETED"}] * 5
    assert '"step": 3' in (tmp_path / "evaluation" / "evaluation.json").read_text()


def test_a_job_whose_predecessor_failed_is_cancelled(cluster: Cluster, tmp_path: Path, raw: Path) -> None:
    """Not left in the queue for ever, as Slurm would; a refusal is not tried again."""
    first, second = launch(
        "program=train.tokenizer", f"inputs=[{raw}]", f"output={tmp_path}/t.model", "vocab_size=30000",
        "then=train.encode", f"inputs=[{raw}]", f"output={tmp_path}/latents", f"tokenizer={tmp_path}/t.model",
    )[0]  # fmt: skip
    assert cluster.wait(first) == "FAILED"
    assert cluster.wait(second) == "CANCELLED"
    (attempt,) = attempts(tmp_path / "t.model.slurm", first)
    assert attempt["status"] == 2 and attempt["reason"].startswith("refused")


def test_the_batch_scripts_work_as_they_stand(
    cluster: Cluster,
    tmp_path: Path,
    tokenizer: Tokenizer,
    sources: dict[str, Path],
    raw: Path,
    vae_folder: Path,
    straight: Path,
    drawn: DrawingRun,
) -> None:
    """sbatch from the repository's root; sizes from the command line, as a user gives them. P6: 75 is requeued."""
    run_dir, output = tmp_path / "run", tmp_path / "latents"

    def sbatch(script: str, *options: str, log: str = "%x.log", arguments: list[str]) -> str:
        sizes = ["--time=10", "--export=ALL,OMP_NUM_THREADS=1", f"--output={tmp_path}/{log}", *options]
        command = ["sbatch", "--parsable", *sizes, f"slurm/{script}.sbatch", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    one = ["--gpus-per-node=1", "--ntasks-per-node=1"]
    job_id = sbatch("pretrain", "--nodes=2", *one, arguments=training(run_dir, tokenizer, sources))
    wait_for_step(run_dir, 10, tmp_path / "pretrain.log")
    cluster.signal(job_id, "USR2")
    encode = sbatch(
        "encode", "--array=0-1", log="%x_%a.log", arguments=arguments(raw, output, tokenizer, vae=vae_folder)
    )
    options = [f"inputs=[{raw}]", f"output={tmp_path}/vae", "device=cpu", "resolution=32", "batch_size=8"]
    vae = sbatch("vae", *one, arguments=[*options, "optim.steps=2", *SMALL_VAE])
    after = f"--dependency=afterok:{job_id}"
    evaluate = sbatch(
        "evaluate",
        after,
        arguments=[
            "device=cpu",
            f"checkpoint={drawn.run_dir}",
            f"output={tmp_path}/evaluation",
            f"choices.colours={questions(tmp_path)}",
        ],
    )
    for name, job in (("encode_0", encode), ("vae", vae), ("pretrain", job_id), ("evaluate", evaluate)):
        assert cluster.wait(job, timeout_s=120) == "COMPLETED", tail(tmp_path / f"{name}.log")
    assert_same_end(run_dir, straight)
    assert cluster.history(job_id) == ["REQUEUED", "COMPLETED"]
    assert [attempt["status"] for attempt in attempts(run_dir / "slurm", job_id)] == [75, 0]
    assert (output / "manifest.json").is_file() and (tmp_path / "vae" / "vae.json").is_file()
    assert (tmp_path / "evaluation" / "evaluation.json").is_file()
