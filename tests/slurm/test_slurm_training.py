"""Real training on a real Slurm: sent, stopped in every way Slurm has, requeued, finished with the same bits."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.runs import assert_same_end, numbers, saved_steps
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.launched import STEPS, attempts, launch, processes, training, wait_for_step
from tests.test_wandb_stops import assert_complete

pytestmark = pytest.mark.slurm


@pytest.fixture
def sent(
    cluster: Cluster, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> Callable[..., tuple[str, Path, Path]]:
    """Send the training to two nodes, one rank each; returns job id, run folder and console log at step 10."""

    def send(*options: object) -> tuple[str, Path, Path]:
        run_dir = tmp_path / "run"
        (job_id,), _ = launch(*training(run_dir, tokenizer, sources), "nodes=2", "plan=false", *options)
        log = run_dir / "slurm" / f"{job_id}.log"
        wait_for_step(run_dir, 10, log)
        return job_id, run_dir, log

    return send


def test_a_training_is_submitted_and_done(
    cluster: Cluster, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """Two nodes of two tasks."""
    run_dir = tmp_path / "run"
    argv = [*training(run_dir, tokenizer, sources), "optim.steps=20", "nodes=2", "tasks_per_node=2"]
    (job_id,), printed = launch(*argv, "time=10")
    log = run_dir / "slurm" / f"{job_id}.log"
    assert f"tail -F {log}" in printed
    assert cluster.wait(job_id) == "COMPLETED" and cluster.history(job_id) == ["COMPLETED"]
    assert "step 20/20" in log.read_text() and "attempt 1 ended: done" in log.read_text()
    assert sorted(path.name for path in (run_dir / "slurm" / job_id).iterdir()) == [
        "job.json", "rank-1.log", "rank-2.log", "rank-3.log"
    ]  # fmt: skip
    (attempt,) = attempts(run_dir / "slurm", job_id)
    assert (attempt["tasks"], attempt["gained"], attempt["status"]) == (4, 20, 0) and len(attempt["nodes"]) == 2


def test_requeued_by_hand_and_by_its_own_signal_it_ends_with_the_same_bits(
    sent: Callable, cluster: Cluster, straight: Path
) -> None:
    """P4, P6: scontrol requeue warns by SIGTERM, a limit by SIGUSR2; each saves, nothing is redone. One wandb run."""
    job_id, run_dir, log = sent("log.wandb=offline")
    owner = json.loads((run_dir / "attempt.json").read_text())
    environment = Path(f"/proc/{owner['pid']}/environ").read_text()
    (master,), node = re.findall(r"MASTER_ADDR=(\w+)", environment), attempts(run_dir / "slurm", job_id)[0]["nodes"][0]
    assert owner["host"] == master == node  # a name of the first node, not of this machine
    assert f"PYTHONPATH={run_dir}/slurm/code-" in environment
    ranks = processes("train.pretrain")
    for pid in ranks:  # or a slow launch finds the job done
        os.kill(pid, signal.SIGSTOP)
    _, printed = launch(f"config={run_dir}/config.yaml", "nodes=1", status=2)
    assert f"job {job_id} of {run_dir} is still there" in printed
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    cluster.requeue(job_id)
    wait_for(lambda: "attempt 2 of job" in log.read_text(), 60, log.read_text)
    wait_for_step(run_dir, attempts(run_dir / "slurm", job_id)[1]["at"] + 10, log)
    cluster.signal(job_id, "USR2")
    assert cluster.wait(job_id) == "COMPLETED"
    assert cluster.history(job_id) == ["REQUEUED", "REQUEUED", "COMPLETED"]
    assert_same_end(run_dir, straight)
    assert numbers(run_dir) == numbers(straight)
    found = attempts(run_dir / "slurm", job_id)
    assert [attempt["at"] for attempt in found[1:]] == [found[0]["gained"], found[0]["gained"] + found[1]["gained"]]
    assert [attempt["status"] for attempt in found] == [75, 75, 0]
    pages = [path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(pages) >= 3 and len(set(pages)) == 1  # a file an attempt, or two if Slurm's signal ended wandb's process
    assert_complete(run_dir)
    assert "stopped by SIGTERM" in log.read_text() and "stopped by SIGUSR2" in log.read_text()


@pytest.mark.slow  # to the ranks a signal like that of a requeue
def test_preempted_by_a_higher_partition_it_ends_with_the_same_bits(
    sent: Callable, cluster: Cluster, straight: Path
) -> None:
    """P4, P6."""
    job_id, run_dir, log = sent("partition=scavenge")
    urgent = cluster.submit("sleep 1", "-p", "main", f"--nodes={len(cluster.nodes)}", "--exclusive", "-o", "/dev/null")
    wait_for(lambda: "attempt 1 ended: stopped by preemption" in log.read_text(), 60, log.read_text)
    assert cluster.wait(urgent) == "COMPLETED"
    assert cluster.wait(job_id) == "COMPLETED"
    assert_same_end(run_dir, straight)
    assert [attempt["status"] for attempt in attempts(run_dir / "slurm", job_id)] == [75, 0]


@pytest.mark.slow  # a limit is a minute at least; its signal is that of the test of requeueing
def test_at_its_time_limit_it_saves_and_goes_on_with_the_same_bits(
    sent: Callable, cluster: Cluster, straight: Path
) -> None:
    """P4, P6. Slurm looks at limits every 30 s: the ranks are stopped until its warning, with a SIGCONT, wakes them."""
    job_id, run_dir, log = sent("time=1", "signal_delay=50", "timeout_minutes=5")
    for pid in processes("train.pretrain"):
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "stopped by the time limit" in log.read_text(), 90, log.read_text)
    assert cluster.wait(job_id, timeout_s=180) == "COMPLETED"
    assert_same_end(run_dir, straight)
    assert "TIMEOUT" not in cluster.history(job_id)


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_from_the_last_checkpoint(
    sent: Callable, cluster: Cluster, straight: Path
) -> None:
    """A fault of the machine looks like this: kill -9 of one rank; the others end, the job is requeued (P4)."""
    job_id, run_dir, log = sent()
    wait_for_step(run_dir, 30, log)
    subprocess.run(["kill", "-9", str(json.loads((run_dir / "attempt.json").read_text())["pid"])], check=True)
    assert cluster.wait(job_id) == "COMPLETED"
    assert_same_end(run_dir, straight)
    first, second = attempts(run_dir / "slurm", job_id)
    assert first["reason"] == "failed with status 137" and second["at"] >= 20
    assert "lost rank 0" in (run_dir / "slurm" / job_id / "rank-1.log").read_text()


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_that_goes_down_costs_the_steps_since_the_last_checkpoint(
    sent: Callable, cluster: Cluster, straight: Path, which: int
) -> None:
    """P4, P5: the node with the job's supervisor, or another. It goes on elsewhere, and ends with the same bits."""
    job_id, run_dir, log = sent()
    wait_for_step(run_dir, 30, log)
    node = attempts(run_dir / "slurm", job_id)[0]["nodes"][which]
    cluster.node("kill", node)
    cluster.set_down(node)
    assert cluster.wait(job_id) == "COMPLETED"
    assert_same_end(run_dir, straight)
    first, second = attempts(run_dir / "slurm", job_id)
    assert node not in second["nodes"] and 20 <= second["at"] < STEPS
    assert "NODE_FAIL" in first["reason"] if which == 0 else first["status"] or "NODE_FAIL" in first["reason"]


def test_the_late_predecessor_of_a_requeued_job_writes_nothing(
    cluster: Cluster, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], straight: Path
) -> None:
    """P5: its node was given up, not dead; rank and supervisor come to themselves while the next attempt trains."""
    run_dir = tmp_path / "run"
    argv = [*training(run_dir, tokenizer, sources), "timeout_minutes=5"]  # what was frozen must not time out
    (job_id,), _ = launch(*argv, "tasks_per_node=2", "plan=false")
    log = run_dir / "slurm" / f"{job_id}.log"
    wait_for_step(run_dir, 30, log)
    (node,) = attempts(run_dir / "slurm", job_id)[0]["nodes"]
    cluster.freeze(node)
    cluster.set_down(node)
    wait_for(lambda: json.loads((run_dir / "attempt.json").read_text())["attempt"] == 2, 60, log.read_text)
    cluster.thaw(node)
    assert cluster.wait(job_id) == "COMPLETED"
    assert_same_end(run_dir, straight)
    assert numbers(run_dir) == numbers(straight)
    # The old srun may end the new attempt's step, which has its number: that costs an attempt and nothing else.
    assert attempts(run_dir / "slurm", job_id)[-1]["reason"] == "done" and cluster.history(job_id)[-1] == "COMPLETED"
    wait_for(lambda: "taken over from attempt 1" in log.read_text(), 30, log.read_text)
    wait_for(lambda: "long after Slurm had begun another" in log.read_text(), 30, log.read_text)


def test_scancel_ends_it_with_a_checkpoint_and_other_nodes_go_on(
    sent: Callable, cluster: Cluster, straight: Path
) -> None:
    """P3, P6: cancelled means cancelled; the same command on another number of nodes trains on the same batches."""
    job_id, run_dir, log = sent()
    cluster.cancel(job_id)
    assert cluster.wait(job_id) == "CANCELLED"
    (stopped,) = attempts(run_dir / "slurm", job_id)
    assert stopped["gained"] == saved_steps(run_dir)[-1] >= 10 and "CANCELLED" in stopped["reason"]
    assert "requeued" not in log.read_text()
    (job_id,), _ = launch(f"config={run_dir}/config.yaml", "nodes=3", "plan=false")
    wait_for_step(run_dir, stopped["gained"] + 10, run_dir / "slurm" / f"{job_id}.log")
    cluster.signal(job_id, "INT")  # a person's stop: saved, not requeued
    assert cluster.wait(job_id) == "FAILED"
    assert attempts(run_dir / "slurm", job_id)[0]["reason"] == "stopped by a person"
    (job_id,), _ = launch(f"config={run_dir}/config.yaml", "tasks_per_node=1", "plan=false")
    assert cluster.wait(job_id) == "COMPLETED"
    for mine, theirs in zip(numbers(run_dir), numbers(straight), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_job_that_gains_nothing_is_not_requeued_for_ever(
    cluster: Cluster, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """It fails on damaged data: the first attempt saves some steps, the second none."""
    damaged = tmp_path / "damaged"
    shutil.copytree(sources["pairs"], damaged)
    for shard in damaged.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2 :: 512] = bytes(len(range(len(content) // 2, len(content), 512)))
        shard.write_bytes(content)
    run_dir = tmp_path / "run"
    argv = training(run_dir, tokenizer, {**sources, "pairs": damaged})
    (job_id,), _ = launch(*argv, "plan=false", "max_requeues=1", "data.max_bad_documents=26")
    assert cluster.wait(job_id) == "FAILED"
    found = attempts(run_dir / "slurm", job_id)
    assert len(found) == 2 and found[0]["gained"] > 0 == found[1]["gained"]
    assert "1 attempts in a row gained nothing: not requeued" in (run_dir / "slurm" / f"{job_id}.log").read_text()


def test_a_bad_config_is_refused_before_it_is_submitted(
    cluster: Cluster, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: neither the queue nor accounting ever hears of it; and what sbatch refuses, is said in its words."""
    before = subprocess.run(["sacct", "-X", "-n", "-a"], capture_output=True, text=True, check=True).stdout
    argv = training(tmp_path / "run", tokenizer, sources)
    _, printed = launch(*argv, "optim.learning_rat=1", status=2)
    assert "did you mean 'optim.learning_rate'?" in printed
    _, printed = launch(*argv, "partiton=main", status=2)
    assert "did you mean slurm.launch's 'partition'?" in printed
    _, printed = launch(*argv, "nodes=6", status=2)
    assert "world_size=6 is more than data.lanes=5" in printed
    _, printed = launch(*argv, "partition=nosuch", "plan=false", status=2)
    assert "sbatch refused the job" in printed and printed.count("invalid partition") == 1
    assert subprocess.run(["sacct", "-X", "-n", "-a"], capture_output=True, text=True, check=True).stdout == before
