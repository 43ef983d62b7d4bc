"""The test cluster is what it claims to be: what the other tests on Slurm stand on."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, run, wait_for

pytestmark = pytest.mark.slurm


def test_every_node_runs_tasks_under_its_own_name_and_accounting_knows(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "names"
    job_id = cluster.submit('srun sh -c "hostname; echo $SLURM_JOB_ID"', "--nodes=3", "--output", out)
    assert cluster.wait(job_id, timeout_s=30) == "COMPLETED"
    assert sorted(out.read_text().split()) == sorted([*cluster.nodes, *[job_id] * 3])
    assert cluster.nodes == ("node0", "node1", "node2")
    wait_for(lambda: cluster.history(job_id) == ["COMPLETED"], 10, lambda: str(cluster.history(job_id)))


def test_a_node_that_lost_its_power_comes_back_idle(cluster: Cluster) -> None:
    job_id = cluster.submit("srun sleep 300", "--nodelist=node1", "--no-requeue", "--output=/dev/null")
    assert cluster.wait(job_id, ("RUNNING",), timeout_s=20) == "RUNNING"
    cluster.node("kill", "node1")
    cluster.set_down("node1")
    assert cluster.wait(job_id, ("NODE_FAIL",), timeout_s=20) == "NODE_FAIL"
    cluster.clear()
    assert run("sinfo", "-h", "-n", "node1", "-p", "main", "-o", "%T").strip() == "idle"
