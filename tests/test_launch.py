"""slurm.launch without a cluster: whose option is whose, what is refused before it is queued, the batch script."""

import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from slurm import job, options, scheduler, signal_delay, snapshot, srun
from slurm.options import LaunchConfig
from slurm.programs import PROGRAMS, finished_shards, last_row, newest_checkpoint
from slurm.record import INNOCENT, Attempt, Record
from slurm.task import environment, tasks_by_node
from tests.runs import settings

ROOT = Path(__file__).parent.parent


def launch(*argv: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "slurm.launch", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_an_option_is_ours_or_sbatchs_or_the_programs() -> None:
    (ours, theirs), *rest = options.read(
        ["config=a.yaml", "nodes=2", "gpus_per_node=8", "partition=gpu", "mail-type=END,FAIL",
         "sbatch.new_option=5", "comment=it's: a # circle", "optim.steps=3", "env.NCCL_SOCKET_IFNAME=ib0"]
    )  # fmt: skip
    assert not rest and theirs == ["config=a.yaml", "optim.steps=3"]
    assert (ours.nodes, ours.tasks, ours.env) == (2, 8, {"NCCL_SOCKET_IFNAME": "ib0"})
    assert ours.sbatch == {
        "partition": "gpu", "mail_type": "END,FAIL", "new_option": "5", "comment": "it's: a # circle"
    }  # fmt: skip


def test_the_launcher_shadows_no_programs_option() -> None:
    """Compares the first part of each key. `train.plan` and `train.demo` are never queued."""
    for name in PROGRAMS:
        keys = [field.name for field in dataclasses.fields(importlib.import_module(name).CONFIG)]
        assert options.sort([f"{key}=1" for key in keys])[1] == [f"{key}=1" for key in keys], name


def test_a_chain_inherits_the_partition_and_not_the_size() -> None:
    jobs = options.read(
        ["partition=gpu", "account=lab", "program=train.encode", "array=256%32", "time=60", "mem=8G", "inputs=[a]",
         "then=train.pretrain", "config=b.yaml", "nodes=4", "gpus_per_node=8",
         "then=train.evaluate", "account=other", "dry_run=true"]
    )  # fmt: skip
    assert [ours.program for ours, _ in jobs] == ["train.encode", "train.pretrain", "train.evaluate"]
    assert [theirs for _, theirs in jobs] == [["inputs=[a]"], ["config=b.yaml"], []]
    assert all(ours.dry_run for ours, _ in jobs)
    assert [ours.sbatch for ours, _ in jobs] == [
        {"partition": "gpu", "account": "lab", "mem": "8G"},
        {"partition": "gpu", "account": "lab"},
        {"partition": "gpu", "account": "other"},
    ]
    assert [(ours.nodes, ours.tasks, ours.elements, ours.time) for ours, _ in jobs] == [
        (1, 1, (256, 32), "60"), (4, 8, (1, 1), None), (1, 1, (1, 1), None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["program=train.pretrian"], "program=train.pretrian: expected one of train.scenes"),
        (["nodes=0"], "nodes=0: expected at least 1"),
        (["gpus_per_node=many"], "gpus_per_node=many: expected a count such as 8"),
        (["gpus_per_node=8", "tasks_per_node=4"], "expected one task a GPU"),
        (["gpus_per_task=1"], "gpus_per_task=1: give gpus_per_node"),
        (["array=8"], "train.pretrain is one job; arrays are for train.encode"),
        (["program=train.encode", "array=1"], "array=1: expected N or N%M"),
        (["program=train.encode", "array=1000000000"], "at most 100,000"),
        (["program=train.encode", "array=8%0"], "array=8%0: expected N or N%M"),
        (["program=train.tokenizer", "nodes=2"], "train.tokenizer is one task"),
        (["time=5"], "time=5 is not longer than signal_delay=300 seconds"),
        (["requeue=true"], "jobs may always be requeued"),
        (["sbatch.gpus-per-task=1"], "gpus-per-task=1: give gpus_per_node"),
        (["sbatch.nodes=2"], "nodes=2: give nodes= itself"),
        (["chdir=/tmp"], "chdir=/tmp: paths are relative to the current folder"),
        (["wait=true"], "wait=true: after submission, run the tail -F command"),
        (["env.A-B=1"], "env.A-B: not a valid name"),
        (["nodes"], "'nodes' is not of the form key=value"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused_with_a_remedy(argv: list[str], words: str) -> None:
    """P10."""
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        options.read(argv)


def test_time_limits_are_read_as_sbatch_reads_them() -> None:
    times = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-12": 129_600, "1-0:30": 88_200, "2-00:00:01": 172_801}
    assert {time: scheduler.seconds_of(time) for time in times} == times
    assert scheduler.seconds_of("UNLIMITED") is None


def test_a_bad_config_or_missing_data_never_waits_in_a_queue(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: nothing is written or submitted; the message is the program's own."""
    good = settings(tmp_path / "run", tokenizer, sources)
    done = launch("program=train.pretrain", *good, "data.sources.pairs.path=/nowhere")
    assert done.returncode == 2 and "/nowhere" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_training_that_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    large = {"model__transformer__width": 32768, "model__transformer__layers": 1}
    argv = settings(tmp_path / "run", tokenizer, sources, micro_batch_size=1, data__lanes=1, **large)
    done = launch("program=train.pretrain", *argv, "device=cuda", "gpus_per_node=1", "gpu=4090", "dry_run=true")
    assert done.returncode == 2, done.stderr
    assert "does not fit: " in done.stderr and "plan=false submits it" in done.stderr


def test_a_folder_with_characters_special_to_sbatch_or_python_is_refused(tmp_path: Path) -> None:
    for name in ("lr%j", "a:b", "a\\b", "a\nb"):
        done = launch("program=train.tokenizer", f"output={tmp_path}/{name}/t", "inputs=[x]", "dry_run=true")
        assert done.returncode == 2 and "jobs cannot use a folder with" in done.stderr, done.stderr


def test_a_dry_run_prints_the_scripts_and_writes_nothing(tmp_path: Path) -> None:
    """Of the whole chain, on a machine without Slurm: PATH leaves Slurm out."""
    done = launch(
        "partition=gpu", "program=train.tokenizer", f"output={tmp_path}/t.model", "inputs=[x]", "dry_run=true",
        "then=train.encode", "array=16%4", f"output={tmp_path}/latents", "inputs=[x]", f"tokenizer={tmp_path}/t.model",
        "gpus_per_node=h100:1", "exclusive=true", "setup=[module load cuda]",
        PATH=f"{Path(sys.executable).parent}:/bin",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("#!/bin/bash")[1:]
    assert "#SBATCH --partition=gpu\n" in first and "#SBATCH --array" not in first
    expected = "--array=0-15%4 --gpus-per-node=h100:1 --partition=gpu --exclusive --requeue --signal=USR2@300"
    for option in [*expected.split(), f"--output={tmp_path}/latents.slurm/%A_%a.log", "--open-mode=append"]:
        assert f"#SBATCH {option}\n" in second, second
    assert "\nmodule load cuda\n" in second and "srun" not in second
    assert list(tmp_path.iterdir()) == []


def test_a_signal_delay_too_short_for_a_step_and_its_saves_is_warned_of(tmp_path: Path) -> None:
    """P6: as the run has measured so far, or as planned."""
    config, plan = {"run_dir": str(tmp_path)}, {"step_s": 10.0, "checkpoint_gib": 200.0}
    assert signal_delay.warnings(config, None, LaunchConfig()) == []
    (line,) = signal_delay.warnings(config, plan, LaunchConfig())
    assert "take 410 s (planned, at 1 GiB/s), signal_delay=300 is less: give signal_delay=615" in line
    rows = '{"step": 1, "stop_s": null}\n{"step": 2, "stop_s": 400.0}\n{"step": 3, "stop_s": 90.0}\n{"st'
    (tmp_path / "metrics.jsonl").write_text(rows)
    (line,) = signal_delay.warnings(config, plan, LaunchConfig())
    assert "take 400 s (measured), signal_delay=300 is less: give signal_delay=600" in line
    assert signal_delay.warnings(config, plan, LaunchConfig(signal_delay=600)) == []


def test_a_task_gets_the_variables_that_torchrun_would_set() -> None:
    given = {"SLURM_PROCID": "13", "SLURM_NTASKS": "20", "SLURM_LOCALID": "5", "SLURM_NODEID": "1"}
    given |= {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_CPUS_PER_TASK": "6", "NCCL_SOCKET_IFNAME": "ib0"}
    variables = environment({**given, "TRITON_CACHE_DIR": "/mine"}, "/tmp/node", ["lo", "ib0"])
    assert {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "13", "WORLD_SIZE": "20", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"
    }  # fmt: skip
    assert variables["OMP_NUM_THREADS"] == "6" and variables["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "GLOO_SOCKET_IFNAME" not in environment(given, "/tmp/node", ["lo", "eth0"])
    assert variables["TORCHINDUCTOR_CACHE_DIR"].startswith("/tmp/node") and "TRITON_CACHE_DIR" not in variables
    assert tasks_by_node("3") == [3] and tasks_by_node("2(x3),1,4(x2)") == [2, 2, 2, 1, 4, 4]


def test_two_jobs_on_a_node_get_two_ports() -> None:
    first = srun.free_port("17 1")
    assert srun.free_port("17 1") == first != srun.free_port("18 1")
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert srun.free_port("17 1") not in (first, None)


def test_a_snapshot_is_kept_once_and_runs_without_the_working_tree(tmp_path: Path) -> None:
    code = snapshot.write_code(tmp_path)
    assert snapshot.write_code(tmp_path) == code and [path.name for path in tmp_path.iterdir()] == [code.name]
    assert (code / "train" / "pages" / "page.css").is_file() and not list(code.rglob("__pycache__"))
    shown = subprocess.run(
        [sys.executable, "-c", "import train.config, slurm.job; print(train.config.__file__, slurm.job.__file__)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown == [f"{code}/train/config.py", f"{code}/slurm/job.py"]


def test_a_record_counts_attempts_without_progress(tmp_path: Path) -> None:
    path = tmp_path / "17" / "job.json"
    record = Record.open(path, "17", "train.pretrain", "c.yaml")
    for number, (at, reached) in enumerate([(0, 5), (5, 5), (5, 5)], start=1):
        record.begin(Attempt(number, ["n0"], 2, "now", at)).end(reached, 75, "stopped")
    assert record.idle() == 2
    record.write()
    again = Record.open(path, "17", "train.pretrain", "c.yaml")
    assert again.idle() == 2 and [attempt.gained for attempt in again.attempts] == [5, 0, 0]
    again.begin(Attempt(4, ["n0"], 2, "now", 5))
    assert json.loads(path.read_text())["attempts"][3]["ended"] is None
    again.attempts[-1].end(5, 75, INNOCENT[0])  # preempted as it started
    assert again.idle() == 2
    for number in range(5, 14):  # however often: that is bounded too
        again.begin(Attempt(number, ["n0"], 2, "now", 5)).end(5, 75, INNOCENT[0])
    assert again.idle() == 3
    path.write_text('{"attempts": [{')  # torn
    assert Record.open(path, "17", "train.pretrain", "c.yaml").attempts == []


def test_a_full_disk_costs_the_record_and_the_log_and_not_the_attempt(tmp_path: Path) -> None:
    """An attempt without progress that cannot be recorded is not requeued: it would be for ever."""
    (tmp_path / "job.json").mkdir()  # cannot be replaced
    program = (
        "import sys; from pathlib import Path; from slurm.job import Job, requeue; from slurm.record import *\n"
        "record = Record.open(Path(sys.argv[1]), '17', 'train.pretrain', 'c.yaml')\n"
        "record.begin(Attempt(1, ['n0'], 2, 'now', 5)).end(5, 1, 'failed')\n"
        "job = Job(program='', config='', jobs='', signal_delay_s=0, max_requeues=3)\n"
        "print(requeue('17', record, job), file=sys.stderr)"
    )
    for log in ("/dev/full", "/dev/null"):
        command = [sys.executable, "-c", program, str(tmp_path / "job.json")]
        with open(log, "w") as stdout:
            done = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
        assert "cannot be recorded" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_progress_is_where_a_restart_would_resume(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == finished_shards(tmp_path) == last_row(tmp_path / "vae") == 0
    for name in ("step-00000005", "step-00000040", ".tmp-step-50"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "a.tar.json").touch()
    (tmp_path / "vae.partial").mkdir()
    (tmp_path / "vae.partial" / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    assert (newest_checkpoint(tmp_path), finished_shards(tmp_path), last_row(tmp_path / "vae")) == (40, 1, 20)
    with (tmp_path / "vae.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"st')
    assert last_row(tmp_path / "vae") == 0  # in the middle of a write


def test_a_job_without_a_program_is_refused() -> None:
    command = [sys.executable, "-m", "slurm.job", "optim.steps=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "program is required" in done.stderr, done.stderr
    assert job.JobConfig(program="train.vae").max_requeues == 3
