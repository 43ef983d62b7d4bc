"""Send a program to Slurm: what ran as `torchrun -m train.pretrain ...` runs on any number of nodes.

    python -m slurm.launch program=train.pretrain config=FILE nodes=32 gpus_per_node=8 partition=gpu time=2-00:00:00

Checks the config and its data, and whether the training fits, before anything is queued; keeps code and config as they
are now in the run's folder; submits one task a GPU. The job saves when its time ends or another takes its place, is
requeued and goes on; the same command again goes on too, on any number of nodes. `then=PROGRAM ...` begins a job that
starts when the one before is done; sbatch's options hold on for it, sizes and times do not.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from slurm import notice, scheduler, snapshot, watch
from slurm.job import Job, run_locally
from slurm.options import SBATCH, LaunchConfig, read
from slurm.programs import resolve
from slurm.scheduler import SlurmError
from train.config import run_program

CONFIG = LaunchConfig


@dataclass(frozen=True)
class Planned:
    """A job that has been checked."""

    launch: LaunchConfig
    arguments: list[str]  # of the program, as given
    resolved: str  # its config, YAML
    plan: dict[str, Any] | None  # what train.plan says

    @property
    def config(self) -> dict[str, Any]:
        return OmegaConf.to_container(OmegaConf.create(self.resolved))

    @property
    def jobs(self) -> Path:
        return self.launch.found.jobs_folder(self.config)

    @property
    def name(self) -> str:
        """Return a name for the queue: the verb, and what it writes."""
        return f"{self.launch.program.rpartition('.')[2]}-{self.launch.found.folder(self.config).name}"


def main(argv: list[str]) -> int:
    asked = read(argv)
    with ThreadPoolExecutor() as pool:  # each imports torch
        planned = list(pool.map(check, asked, range(len(asked))))
    for job in planned:
        for line in describe(job):
            print(f"launch: {line}")
    if asked[0][0].dry_run:
        for job in planned:
            print(f"\n{script(job, snapshot.ROOT, job.jobs / 'config.yaml', None)}")
        return 0
    if asked[0][0].cluster == "local":
        return _run_here(planned)
    for job in planned:
        _refuse_twice(job)
    job_ids: list[str] = []
    for job in planned:
        job_ids.append(submit(job, after=job_ids[-1] if job_ids else None))
        print("\n".join(how_to(job, job_ids[-1])), flush=True)
    print("\nto resume, the same command again, on any number of nodes", flush=True)
    if asked[0][0].wait:
        return watch.follow(
            [
                watch.Watched(job_id, job.name, console(job, job_id), job.launch.elements[0])
                for job_id, job in zip(job_ids, planned, strict=True)
            ]
        )
    return 0


def check(asked: tuple[LaunchConfig, list[str]], number: int) -> Planned:
    """Resolve a job's config; where no other job has to make its input first, look at that too.

    Raises ValueError for a job that could not run: it would wait in the queue for nothing.
    """
    launch, arguments = asked
    awaited = number > 0 or "dependency" in launch.sbatch or launch.dry_run
    try:
        resolved = resolve(launch.program, arguments, check=not awaited)
    except ValueError as error:
        raise ValueError(f"{launch.program}: {error}{near(str(error))}") from None
    planned = Planned(launch, arguments, resolved, None)
    if strange := set("%:\\\n") & set(str(planned.jobs)):  # placeholders of sbatch's, and a separator of PYTHONPATH
        raise ValueError(f"{planned.jobs}: no job can work in a folder with {' '.join(map(repr, strange))} in its name")
    if launch.program == "train.pretrain" and launch.plan:
        plan = make_plan(launch, resolved)
        if launch.num_gpus and not plan["fits"]:
            remedy = plan.get("would_fit_with")
            raise ValueError(
                f"{launch.program}: does not fit: {plan['peak_memory_gib']:.1f} GiB at the peak of each rank, and "
                f"{plan['usable_memory_gib']:.1f} GiB of a {launch.gpu} (gpu=) are there; "
                + (f"it would fit with {' '.join(remedy)}" if remedy else "give it more nodes")
                + ". plan=false sends it all the same"
            )
        planned = replace(planned, plan=plan)
    return planned


def make_plan(launch: LaunchConfig, resolved: str) -> dict[str, Any]:
    """Return what train.plan says of a training on these nodes; raises ValueError with its refusal."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(resolved)
        file.flush()
        options = [f"world_size={launch.nodes * launch.tasks}", f"gpus_per_node={launch.tasks}", f"gpu={launch.gpu}"]
        device = [] if launch.num_gpus else ["device=cpu"]
        command = [sys.executable, "-m", "train.plan", f"config={file.name}", *options, *device, "json=true"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{launch.program}: {done.stderr.strip().removeprefix('train.plan: ')}")
    return json.loads(done.stdout)


def near(refusal: str) -> str:
    """Return which option of ours or of sbatch's an unknown key may have meant: the program knows its own only."""
    key = re.search(r"unknown key '(\w+)'", refusal)
    names = [*(field.name for field in dataclasses.fields(LaunchConfig)), *sorted(SBATCH)]
    close = difflib.get_close_matches(key[1], names, n=1, cutoff=0.75) if key else []
    return f"; or did you mean slurm.launch's {close[0]!r}?" if close else ""


def describe(job: Planned) -> list[str]:
    """Return the lines that say what is about to be sent, and what may go wrong with it."""
    launch, plan = job.launch, job.plan
    elements, at_once = launch.elements
    size = f"{launch.nodes * launch.tasks} tasks" if launch.nodes * launch.tasks > 1 else "1 task"
    if launch.nodes > 1:
        size += f" on {launch.nodes} nodes"
    if elements > 1:
        size = f"{elements} elements of {size}" + (f", at most {at_once} at once" if at_once < elements else "")
    lines = [f"{launch.program} -> {shown(launch.found.folder(job.config))}: {size}"]
    if plan is not None:
        total, peak = plan["parameters"]["total"], plan["peak_memory_gib"]
        took = f", {plan['days']:.1f} days at an MFU of 40 %" if "days" in plan else ""
        fits = f"{peak:.1f} of {plan['usable_memory_gib']:.1f} GiB a rank"
        count = f"{total / 1e9:.2f}B" if total >= 1e8 else f"{total / 1e6:.2f}M"
        lines.append(f"  {count} parameters, {fits}{took} (python -m train.plan has the rest)")
    if launch.program == "train.pretrain" and launch.cluster == "slurm":
        lines += [f"  {line}" for line in notice.warnings(job.config, plan, launch)]
    return lines


def script(job: Planned, code: Path, config: Path, after: str | None) -> str:
    """Return the batch script that submitit makes of a job."""
    executor = _executor(job, code, config, after)
    if job.launch.elements[0] > 1:
        executor.parameters["map_count"] = job.launch.elements[0]
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(job: Planned, after: str | None) -> str:
    """Keep code and config, submit the job, to start once job `after` is done; return its id."""
    launch = job.launch
    job.jobs.mkdir(parents=True, exist_ok=True)
    config = snapshot.write_config(job.jobs, job.resolved)
    executor = _executor(job, snapshot.write_code(job.jobs), config, after)
    work = Job(
        program=launch.program,
        config=str(config),
        jobs=str(job.jobs),
        notice_s=launch.signal_delay,
        max_requeues=launch.max_requeues,
    )
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with redirect_stderr(io.StringIO()):  # submitit shows sbatch's words, and then raises them
            if launch.elements[0] > 1:
                return executor.submit_array([work] * launch.elements[0])[0].job_id.partition("_")[0]
            return executor.submit(work).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch refused the job: {' '.join(str(error).split())}") from None


def _executor(job: Planned, code: Path, config: Path, after: str | None) -> Any:
    """Return submitit's executor with the options of a job's batch script."""
    from submitit.slurm.slurm import SlurmExecutor

    launch = job.launch

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # a dry run needs no srun; sbatch says by itself that it is not there

    options = {name: _flag(value) for name, value in launch.sbatch.items() if value.lower() != "false"}
    options |= {"time": launch.time} if launch.time is not None else {}
    if after is not None:
        options |= {"dependency": ",".join(filter(None, [options.get("dependency"), f"afterok:{after}"]))}
    if "dependency" in options:
        options["kill-on-invalid-dep"] = "yes"
    options = {"job_name": job.name, "requeue": True, "output": str(job.jobs / console_name(launch))} | options
    executor = Executor(job.jobs / "submitit")
    executor.update_parameters(
        nodes=launch.nodes,
        ntasks_per_node=launch.tasks,
        cpus_per_task=launch.cpus_per_task,
        gpus_per_node=launch.gpus_per_node,
        signal_delay_s=launch.signal_delay,
        array_parallelism=launch.elements[1],
        stderr_to_stdout=True,
        use_srun=False,  # our supervisor calls it, and stays when the tasks end
        setup=[
            "trap : TERM",  # or bash would die of it, and the supervisor with it, before the tasks have saved
            *launch.setup,
            f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1",  # not what the working tree holds by then
            "export SUBMITIT_LOG_LEVEL=WARNING",
            *(f"export {name}={shlex.quote(value)}" for name, value in launch.env.items()),
        ],
        time=None,  # ours is among the options: submitit's is in minutes, 5 of them by default
        wckey=None,
        additional_parameters=options,
    )
    return executor


def _flag(value: str) -> str | bool:
    return True if value.lower() == "true" else value


def console_name(launch: LaunchConfig) -> str:
    """Return the name of the console log, with sbatch's placeholders for ids."""
    return "%A_%a.log" if launch.elements[0] > 1 else "%j.log"


def console(job: Planned, job_id: str) -> Path:
    """Return the console log of a job that was submitted, of an array that of its first element."""
    return job.jobs / console_name(job.launch).replace("%a", "0").replace("%A", job_id).replace("%j", job_id)


def how_to(job: Planned, job_id: str) -> list[str]:
    """Return the lines that say where a job's logs are, how to watch and stop it."""
    log = shown(console(job, job_id))
    lines = [
        f"\njob {job_id}: {job.name}",
        f"  watch    tail -F {shlex.quote(log)}; other tasks' logs and job.json in {log.removesuffix('.log')}/",
    ]
    stop = f"scancel {job_id}"
    if job.launch.program == "train.pretrain":
        stop = f"scancel --signal=INT {job_id}, which lets it save first ({stop} gives it KillWait for that)"
    return [*lines, f"  stop     {stop}"]


def shown(path: Path) -> str:
    """Return a path as short as it can be from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _refuse_twice(job: Planned) -> None:
    """Raise ValueError if a job for the same folder waits or runs: it would be refused by the run's lock at last."""
    submitted = {path.name.partition("_")[0] for path in (job.jobs / "submitit").glob("*_submission.sh")}
    there = set(scheduler.ask("squeue", "--noheader", "--me", "--format=%A").split())
    if submitted & there and "dependency" not in job.launch.sbatch:
        job_id = max(submitted & there, key=int)
        raise ValueError(
            f"job {job_id} of {job.launch.found.folder(job.config)} is still there (squeue -j {job_id}): stop it or "
            f"wait for it; or let this one follow it by dependency=afterany:{job_id}"
        )


def _run_here(planned: Sequence[Planned]) -> int:
    """Run the jobs one after the other on this machine; return the first status that is not 0."""
    for job in planned:
        if job.launch.nodes > 1:
            raise ValueError(f"nodes={job.launch.nodes}: cluster=local has this one; leave nodes out")
        config = snapshot.write_config(job.jobs, job.resolved)
        bounds = {"notice_s": None, "max_requeues": job.launch.max_requeues}
        work = Job(program=job.launch.program, config=str(config), jobs=str(job.jobs), **bounds)
        at_once = min(job.launch.elements)
        status = run_locally(work, tasks=job.launch.tasks, elements=at_once, variables=job.launch.env)
        if status:
            return status
    return 0


if __name__ == "__main__":
    run_program(main, lasting=True)
