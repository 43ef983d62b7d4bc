"""Submit programs to Slurm: what ran as `torchrun -m train.pretrain ...` runs on any number of nodes.

    python -m slurm.launch program=train.pretrain config=FILE nodes=32 gpus_per_node=8 partition=gpu time=2-00:00:00

Before anything is queued it checks the config, the data and whether the training fits, and copies code and config into
the run's folder. It submits one task per GPU. The job saves when its time ends or another job preempts it, is requeued
and resumes; the same command again resumes too, on any number of nodes. `then=PROGRAM ...` adds a job that starts when
the previous one succeeds; it inherits sbatch's options, but not sizes or time limits.
"""

import dataclasses
import difflib
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurm import scheduler, signal_delay, snapshot
from slurm.job import Job
from slurm.options import SBATCH, LaunchConfig, read
from slurm.programs import read_resolved, resolve
from slurm.scheduler import SlurmError
from train.config import run_program

CONFIG = LaunchConfig


@dataclass(frozen=True)
class Planned:
    """A job that has been checked."""

    launch: LaunchConfig
    resolved: str  # the program's config, YAML
    plan: dict[str, Any] | None  # output of train.plan

    @property
    def config(self) -> dict[str, Any]:
        return read_resolved(self.resolved)

    @property
    def writes(self) -> Path:
        """Return the folder or file that the program writes."""
        return self.launch.found.folder(self.config)

    @property
    def jobs(self) -> Path:
        return self.launch.found.jobs_folder(self.config)

    @property
    def name(self) -> str:
        """Return the job's name in the queue: the verb, and what it writes."""
        return f"{self.launch.program.rpartition('.')[2]}-{self.writes.name}"

    def console(self, job_id: str | None = None) -> Path:
        """Return the console log of a job, of an array that of its first element; None: with sbatch's placeholders."""
        if self.launch.elements[0] > 1:
            return self.jobs / (f"{job_id}_0.log" if job_id else "%A_%a.log")
        return self.jobs / f"{job_id or '%j'}.log"


def main(argv: list[str]) -> int:
    jobs = read(argv)
    with ThreadPoolExecutor() as pool:  # each check is a process that imports torch
        planned = list(pool.map(check, *zip(*jobs, strict=True), range(len(jobs))))
    for job in planned:
        for line in describe(job):
            print(f"launch: {line}")
    if planned[0].launch.dry_run:
        for job in planned:
            print(f"\n{script(job)}")
        return 0
    for job in planned:
        refuse_second_job(job)
    job_id = None
    for job in planned:
        job_id = submit(job, after=job_id)
        print("\n".join(how_to(job, job_id)), flush=True)
    print("\nsqueue --me lists your jobs; to resume, the same command again, on any number of nodes", flush=True)
    return 0


def check(launch: LaunchConfig, arguments: list[str], number: int) -> Planned:
    """Resolve the config of job `number` and inspect its input, unless another job has to produce that first.

    Raises ValueError for a job that would wait in the queue only to fail.
    """
    has_input = number == 0 and "dependency" not in launch.sbatch and not launch.dry_run
    try:
        resolved = resolve(launch.program, arguments, check=has_input)
    except ValueError as error:
        raise ValueError(f"{launch.program}: {error}{did_you_mean(str(error))}") from None
    job = Planned(launch, resolved, None)
    # % and \ are sbatch's placeholders, and : separates the folders of PYTHONPATH.
    if forbidden := set("%:\\\n") & set(str(job.jobs)):
        names = " ".join(map(repr, forbidden))
        raise ValueError(f"{job.jobs}: jobs cannot use a folder with {names} in its path; choose another")
    if launch.program != "train.pretrain" or not launch.plan:
        return job
    plan = make_plan(launch, resolved)
    if launch.num_gpus and not plan["fits"]:
        remedy = plan.get("would_fit_with")
        raise ValueError(
            f"{launch.program}: does not fit: each rank needs {plan['peak_memory_gib']:.1f} GiB at its peak, a "
            f"{launch.gpu} (gpu=) has {plan['usable_memory_gib']:.1f} GiB; "
            + (f"it would fit with {' '.join(remedy)}" if remedy else "give it more nodes")
            + ". plan=false submits it regardless"
        )
    return replace(job, plan=plan)


def make_plan(launch: LaunchConfig, resolved: str) -> dict[str, Any]:
    """Return train.plan's output for a training on these nodes; raises ValueError with its refusal."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(resolved)
        file.flush()
        options = [f"world_size={launch.nodes * launch.tasks}", f"gpus_per_node={launch.tasks}", f"gpu={launch.gpu}"]
        options += ["json=true"] if launch.num_gpus else ["json=true", "device=cpu"]
        command = [sys.executable, "-m", "train.plan", f"config={file.name}", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{launch.program}: {done.stderr.strip().removeprefix('train.plan: ')}")
    return json.loads(done.stdout)


def did_you_mean(refusal: str) -> str:
    """Suggest the option of the launcher or of sbatch for a key that the program does not know."""
    key = re.search(r"unknown key '(\w+)'", refusal)
    names = [*(field.name for field in dataclasses.fields(LaunchConfig)), *sorted(SBATCH)]
    close = difflib.get_close_matches(key[1], names, n=1, cutoff=0.75) if key else []
    return f"; or did you mean slurm.launch's {close[0]!r}?" if close else ""


def describe(job: Planned) -> list[str]:
    """Return the lines that say what will be submitted, with warnings."""
    launch, plan = job.launch, job.plan
    elements, at_once = launch.elements
    size = f"{launch.nodes * launch.tasks} tasks" if launch.nodes * launch.tasks > 1 else "1 task"
    if launch.nodes > 1:
        size += f" on {launch.nodes} nodes"
    if elements > 1:
        size = f"{elements} elements of {size}" + (f", at most {at_once} at once" if at_once < elements else "")
    lines = [f"{launch.program} -> {shown(job.writes)}: {size}"]
    if plan is not None:
        total, peak = plan["parameters"]["total"], plan["peak_memory_gib"]
        took = f", {plan['days']:.1f} days at an MFU of 40 %" if "days" in plan else ""
        fits = f"{peak:.1f} of {plan['usable_memory_gib']:.1f} GiB a rank"
        count = f"{total / 1e9:.2f}B" if total >= 1e8 else f"{total / 1e6:.2f}M"
        lines.append(f"  {count} parameters, {fits}{took} (python -m train.plan has the rest)")
    if launch.program == "train.pretrain":
        lines += [f"  {line}" for line in signal_delay.warnings(job.config, plan, launch)]
    return lines


def script(job: Planned) -> str:
    """Return the batch script that submitit makes of a job."""
    executor = _executor(job, snapshot.ROOT, after=None)
    if job.launch.elements[0] > 1:
        executor.parameters["map_count"] = job.launch.elements[0]
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(job: Planned, after: str | None) -> str:
    """Store code and config, submit the job to start once job `after` has succeeded; return its id."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    job.jobs.mkdir(parents=True, exist_ok=True)
    work = Job(
        program=job.launch.program,
        config=str(snapshot.write_config(job.jobs, job.resolved)),
        jobs=str(job.jobs),
        signal_delay_s=job.launch.signal_delay,
        max_requeues=job.launch.max_requeues,
    )
    executor = _executor(job, snapshot.write_code(job.jobs), after)
    elements = job.launch.elements[0]
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints sbatch's message before it raises it
            if elements > 1:
                return executor.submit_array([work] * elements)[0].job_id.partition("_")[0]
            return executor.submit(work).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch refused the job: {' '.join(str(error).split())}") from None


def _executor(job: Planned, code: Path, after: str | None) -> Any:
    """Return submitit's executor with the options of a job's batch script."""
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # available: a dry run needs no srun, and a submission without sbatch fails by itself

    launch = job.launch
    options: dict[str, str | bool] = {"job_name": job.name, "requeue": True, "output": str(job.console())}
    if launch.time is not None:
        options["time"] = launch.time
    for name, value in launch.sbatch.items():
        if value.lower() != "false":
            options[name] = value.lower() == "true" or value
    if after is not None:
        options["dependency"] = ",".join(filter(None, [launch.sbatch.get("dependency"), f"afterok:{after}"]))
    if "dependency" in options:
        options["kill-on-invalid-dep"] = "yes"
    executor = Executor(job.jobs / "submitit")
    executor.update_parameters(
        nodes=launch.nodes,
        ntasks_per_node=launch.tasks,
        cpus_per_task=launch.cpus_per_task,
        gpus_per_node=launch.gpus_per_node,
        signal_delay_s=launch.signal_delay,
        array_parallelism=launch.elements[1],
        stderr_to_stdout=True,
        use_srun=False,  # the supervisor (slurm/job.py) calls it, and outlives the tasks
        setup=[
            "trap : TERM",  # or bash would die of it, and the supervisor with it, before the tasks have saved
            *launch.setup,
            f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1",  # the copy, not the working tree
            "export SUBMITIT_LOG_LEVEL=WARNING",
            *(f"export {name}={shlex.quote(value)}" for name, value in launch.env.items()),
        ],
        time=None,  # among the options: submitit's is in minutes and defaults to 5
        wckey=None,
        additional_parameters=options,
    )
    return executor


def how_to(job: Planned, job_id: str) -> list[str]:
    """Return the lines that say where a job's logs are, how to watch and how to stop it."""
    log = shown(job.console(job_id))
    lines = [
        f"\njob {job_id}: {job.name}",
        f"  watch    tail -F {shlex.quote(log)}; other tasks' logs and job.json in {log.removesuffix('.log')}/",
    ]
    stop = f"scancel {job_id}"
    if job.launch.program == "train.pretrain":
        stop = f"scancel --signal=INT {job_id}, which lets it save first ({stop} gives it only KillWait for that)"
    return [*lines, f"  stop     {stop}"]


def shown(path: Path) -> str:
    """Return a path relative to the current folder, if it is in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def refuse_second_job(job: Planned) -> None:
    """Raise ValueError if a job for the same folder is queued or running: the run's lock would refuse one of them."""
    submitted = {path.name.partition("_")[0] for path in (job.jobs / "submitit").glob("*_submission.sh")}
    present = set(scheduler.ask("squeue", "--noheader", "--me", "--format=%A").split())
    if submitted & present and "dependency" not in job.launch.sbatch:
        job_id = max(submitted & present, key=int)
        raise ValueError(
            f"job {job_id} of {job.writes} is still there (squeue -j {job_id}): stop it or wait for it; or let this "
            f"one follow it with dependency=afterany:{job_id}"
        )


if __name__ == "__main__":
    run_program(main, lasting=True)
