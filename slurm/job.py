"""A job's supervisor: starts the tasks, and when they end decides whether the job goes back into the queue.

    python -m slurm.job program=PROGRAM [config=FILE] [key=value ...]      is all that a batch script needs

It runs once a job, in the batch step on the first node; slurm.launch submits the same through submitit. Each task runs
the program (slurm/task.py). Exit status 75 of the program, saved after a signal, means: again, in the same folder. So
does a failure, which may be a lost node's; but only `max_requeues` times in a row without progress.
It holds no handler that saves: signals are the ranks', which agree on a step. This replaces submitit's own handlers,
which would requeue from rank 0 alone, before the others have saved.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from slurm import scheduler
from slurm.programs import PROGRAMS, find_program, resolve
from slurm.record import BY_SLURM, INNOCENT, Attempt, Record, now, say
from slurm.scheduler import SlurmError, patiently
from slurm.snapshot import write_config
from slurm.steps import free_port, run_by_srun, run_here
from train.config import NOTICE, REFUSED, load_config, run_program

CONSOLE, LOGS = "TRANSFUSION_CONSOLE", "TRANSFUSION_LOGS"  # for the tasks: rank 0's file, the other ranks' folder
SAVED, INTERRUPTED = 75, 130  # exit statuses of programs: saved after a signal; a person stopped it
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    program: str = MISSING  # what to run; its own options follow as key=value, config=FILE among them
    notice_s: int | None = None  # seconds of notice that `sbatch --signal` asks for; null: not known
    max_requeues: int = 3  # attempts in a row that may gain nothing; preempted ones count a tenth


CONFIG = JobConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job runs; submitit calls it in the batch step."""

    program: str
    config: str  # file of the resolved config
    jobs: str  # folder of logs and records
    notice_s: int | None
    max_requeues: int

    def __call__(self) -> None:
        status = supervise(self)
        if status:
            sys.exit(status)

    @property
    def together(self) -> bool:
        """Return whether its tasks are ranks of one process group."""
        return PROGRAMS[self.program].tasks == "group"

    @property
    def command(self) -> list[str]:
        """Return what Python runs once a task."""
        return ["-m", "slurm.task", self.program, f"config={self.config}"]

    def progress(self) -> int | None:
        """Return how far the program has come, None where it cannot be told."""
        program = PROGRAMS[self.program]
        folder = program.folder(OmegaConf.to_container(OmegaConf.load(self.config)))
        return program.progress(folder) if program.progress is not None else None

    def environment(self, job_id: str) -> dict[str, str]:
        """Return what every task is told, and make the folder of their logs."""
        logs = Path(self.jobs, job_id)
        logs.mkdir(parents=True, exist_ok=True)
        console = os.path.realpath("/proc/self/fd/1")
        given = {LOGS: str(logs)} | ({CONSOLE: console} if Path(console).is_file() else {})
        return given | ({NOTICE: str(self.notice_s)} if self.notice_s is not None else {})


def main(argv: list[str]) -> int:
    own = {field.name for field in fields(JobConfig)}
    config = load_config(JobConfig, [argument for argument in argv if argument.partition("=")[0] in own])
    program = find_program(config.program)
    resolved = resolve(config.program, [argument for argument in argv if argument.partition("=")[0] not in own])
    jobs = program.jobs_folder(OmegaConf.to_container(OmegaConf.create(resolved)))
    bounds = {"notice_s": config.notice_s, "max_requeues": config.max_requeues}
    return supervise(Job(program=config.program, config=str(write_config(jobs, resolved)), jobs=str(jobs), **bounds))


def supervise(job: Job) -> int:
    """Make one attempt; return its exit status. Whether the job is requeued is settled and said by then."""
    for number in STOPS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the tasks would inherit
    from submitit.slurm.slurm import SlurmJobEnvironment

    slurm = SlurmJobEnvironment()
    job_id, nodes = slurm.job_id, list(slurm.hostnames)
    record = Record.open(Path(job.jobs, job_id, "job.json"), job_id, job.program, job.config)
    at, unit = job.progress(), PROGRAMS[job.program].unit
    if record.attempts and record.attempts[-1].ended is None:  # its supervisor was killed
        record.attempts[-1].end(at, None, f"{BY_SLURM}{scheduler.last_end(job_id) or 'it does not say why'}")
    if record.idle() >= job.max_requeues:
        say(f"{job.max_requeues} attempts in a row gained no {unit}; {record.path} has their reasons. Submit it anew")
        record.write()
        return 1
    attempt = record.begin(Attempt(len(record.attempts) + 1, nodes, int(os.environ["SLURM_NTASKS"]), now(), at))
    tasks = f"{attempt.tasks} tasks" if attempt.tasks > 1 else "1 task"
    begins = f", from {at} {unit}" if at else ""
    say(
        f"attempt {attempt.number} of job {job_id}: {job.program}, {tasks} on {' '.join(nodes)}{begins}; "
        f"{attempt.began}"
    )
    environment = job.environment(job_id)
    environment |= {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(free_port(f"{job_id} {attempt.number}"))}
    status = run_by_srun(job.command, environment, together=job.together)
    if not record.is_latest(attempt):
        say(f"attempt {attempt.number} ended with status {status}, long after Slurm had begun another")
        return status
    reason, again = judge(status, job_id, job.notice_s)
    attempt.end(job.progress(), status, reason)
    gained = f", {attempt.gained} {unit} gained" if attempt.gained or (again and attempt.gained is not None) else ""
    say(f"attempt {attempt.number} ended: {reason}{gained}{requeue(job_id, record, job) if again else ''}")
    record.write()
    return status


def judge(status: int, job_id: str, notice_s: int | None) -> tuple[str, bool]:
    """Return why an attempt ended, and whether we have to requeue the job."""
    try:
        present = patiently(lambda: scheduler.queue(job_id)) if status else scheduler.queue(job_id)
    except SlurmError:
        if status:
            raise
        present = [("RUNNING", "")]  # no answer, and nothing that would hang on it
    state, why = present[0] if present else ("gone", "")
    if state != "RUNNING":
        # Slurm has decided, whatever srun says (0 of a lost node). A requeue of ours would revive what was cancelled.
        end = "TIMEOUT" if why == "TimeLimit" else patiently(lambda: scheduler.final_state(job_id))
        return f"{BY_SLURM}{end}", end == "TIMEOUT"
    if status == 0:
        return "done", False
    if status == REFUSED:
        return "refused: another start would be refused too", False
    if status == INTERRUPTED:
        return "stopped by a person", False
    if status == SAVED or status - 128 in STOPS:
        left_s = patiently(lambda: scheduler.seconds_left(job_id))
        at_limit = left_s is not None and left_s <= (notice_s or 0) + scheduler.EARLY_S
        if at_limit:
            return "stopped by the time limit", True
        if status - 128 == signal.SIGTERM:  # perhaps of srun's, where another rank had failed
            return "ended by SIGTERM before it had saved", True
        return INNOCENT[0], True
    return f"failed with status {status}", True


def requeue(job_id: str, record: Record, job: Job) -> str:
    """Put the job back into the queue unless its attempts gain nothing; return what came of it, in words."""
    if record.idle() >= job.max_requeues:
        return f"; {record.idle()} attempts in a row gained nothing: not requeued"
    if not record.write() and not record.attempts[-1].gained:  # before Slurm ends us
        return "; it gained nothing, and that cannot be noted, so it might be requeued for ever: not requeued"
    try:
        patiently(lambda: scheduler.requeue(job_id))
    except SlurmError as error:
        return f"; not requeued: {error}. Submit it again by hand: it goes on from there"
    return "; requeued"


def run_locally(job: Job, *, tasks: int, elements: int, variables: dict[str, str]) -> int:
    """Run a job's tasks on this machine, of an array all elements at once; return the highest status."""
    of_tasks = []
    began = time.strftime("%Y%m%d-%H%M%S")
    for element in range(elements):
        job_id = f"local-{began}" + (f"_{element}" if elements > 1 else "")
        given = job.environment(job_id) | variables
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(f"{job_id} {os.getpid()}"))}
        given |= {"SLURM_NTASKS": str(tasks), "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": str(tasks)}
        if elements > 1:
            given |= {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_TASK_MIN": "0"}
            given |= {"SLURM_ARRAY_TASK_MAX": str(elements - 1)}
        if element:
            given[CONSOLE] = f"{job.jobs}/{job_id}.log"
        of_tasks += [given | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]
    return run_here(job.command, of_tasks, together=job.together)


if __name__ == "__main__":
    run_program(main, lasting=True)
