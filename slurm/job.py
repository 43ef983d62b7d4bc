"""A job's supervisor: start the tasks, and when they end decide whether the job returns to the queue.

    python -m slurm.job program=PROGRAM [config=FILE] [key=value ...]      is all that a batch script needs

It runs once per job, in the batch step on the first node; slurm.launch submits the same through submitit. Each task
runs the program (slurm/task.py). A program that exits with status 75 has saved after a signal: the job is requeued and
continues in the same folder. A failure is requeued too, since a lost node may have caused it, but only `max_requeues`
times in a row without progress.
The supervisor never saves anything: Slurm signals the ranks, which agree on a step. It replaces submitit's own
handlers, which would requeue from rank 0 alone, before the other ranks have saved.
"""

import os
import signal
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import MISSING

from slurm import scheduler
from slurm.programs import PROGRAMS, find_program, read_resolved, resolve
from slurm.record import BY_SLURM, INNOCENT, Attempt, Record, now, say
from slurm.scheduler import SlurmError, patiently
from slurm.snapshot import write_config
from slurm.srun import free_port, run_by_srun
from train.config import REFUSED, SIGNAL_DELAY, load_config, run_program

CONSOLE, LOGS = "TRANSFUSION_CONSOLE", "TRANSFUSION_LOGS"  # environment: rank 0's log file, folder of the others'
SAVED, INTERRUPTED = 75, 130  # exit statuses of programs: saved after a signal; stopped by Ctrl-C or SIGINT
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    program: str = MISSING  # what to run; its own options follow as key=value, config=FILE among them
    signal_delay: int | None = None  # seconds between the signal of `sbatch --signal` and the end; null: unknown
    max_requeues: int = 3  # attempts in a row without progress before it gives up; a preempted one counts a tenth


CONFIG = JobConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job runs; submitit calls it in the batch step."""

    program: str
    config: str  # file of the resolved config
    jobs: str  # folder of logs and records
    signal_delay_s: int | None
    max_requeues: int

    def __call__(self) -> None:
        status = supervise(self)
        if status:
            sys.exit(status)

    def progress(self) -> int | None:
        """Return how far the program has come, None if unknown."""
        program = PROGRAMS[self.program]
        folder = program.folder(read_resolved(Path(self.config).read_text(encoding="utf-8")))
        return program.progress(folder) if program.progress is not None else None

    def environment(self, job_id: str) -> dict[str, str]:
        """Return the variables of every task, and make the folder of their logs."""
        logs = Path(self.jobs, job_id)
        logs.mkdir(parents=True, exist_ok=True)
        variables = {LOGS: str(logs)}
        console = os.path.realpath("/proc/self/fd/1")
        if Path(console).is_file():
            variables[CONSOLE] = console
        if self.signal_delay_s is not None:
            variables[SIGNAL_DELAY] = str(self.signal_delay_s)
        return variables


def main(argv: list[str]) -> int:
    names = {field.name for field in fields(JobConfig)}
    own = [argument for argument in argv if argument.partition("=")[0] in names]
    config = load_config(JobConfig, own)
    program = find_program(config.program)
    resolved = resolve(config.program, [argument for argument in argv if argument not in own])
    jobs = program.jobs_folder(read_resolved(resolved))
    return supervise(
        Job(
            program=config.program,
            config=str(write_config(jobs, resolved)),
            jobs=str(jobs),
            signal_delay_s=config.signal_delay,
            max_requeues=config.max_requeues,
        )
    )


def supervise(job: Job) -> int:
    """Make one attempt and return its exit status; the job has been requeued by then, or not, and the log says so."""
    for number in STOPS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the tasks would inherit
    from submitit.slurm.slurm import SlurmJobEnvironment

    slurm = SlurmJobEnvironment()
    job_id, nodes = slurm.job_id, list(slurm.hostnames)
    record = Record.open(Path(job.jobs, job_id, "job.json"), job_id, job.program, job.config)
    program, at = PROGRAMS[job.program], job.progress()
    if record.attempts and record.attempts[-1].ended is None:  # its supervisor was killed
        record.attempts[-1].end(at, None, f"{BY_SLURM}{scheduler.last_end(job_id) or 'unknown'}")
    if record.idle() >= job.max_requeues:
        say(f"{job.max_requeues} attempts in a row gained no {program.unit}: see {record.path}, then submit it again")
        record.write()
        return 1
    attempt = record.begin(Attempt(len(record.attempts) + 1, nodes, int(os.environ["SLURM_NTASKS"]), now(), at))
    tasks = f"{attempt.tasks} tasks" if attempt.tasks > 1 else "1 task"
    where = f"{tasks} on {' '.join(nodes)}" + (f", from {at} {program.unit}" if at else "")
    say(f"attempt {attempt.number} of job {job_id}: {job.program}, {where}; {attempt.began}")
    environment = job.environment(job_id)
    environment |= {"MASTER_ADDR": nodes[0], "MASTER_PORT": str(free_port(f"{job_id} {attempt.number}"))}
    command = ["-m", "slurm.task", job.program, f"config={job.config}"]
    status = run_by_srun(command, environment, together=program.tasks == "group")
    if not record.is_latest(attempt):
        say(f"attempt {attempt.number} ended with status {status}, long after Slurm had begun another")
        return status
    reason, again = judge(status, job_id, job.signal_delay_s)
    attempt.end(job.progress(), status, reason)
    show_gain = attempt.gained or (again and attempt.gained is not None)
    gained = f", {attempt.gained} {program.unit} gained" if show_gain else ""
    say(f"attempt {attempt.number} ended: {reason}{gained}{requeue(job_id, record, job) if again else ''}")
    record.write()
    return status


def judge(status: int, job_id: str, signal_delay_s: int | None) -> tuple[str, bool]:
    """Return why an attempt ended, and whether to requeue the job."""
    found: tuple[str, str] | None
    try:
        found = patiently(lambda: scheduler.queue(job_id)) if status else scheduler.queue(job_id)
    except SlurmError:
        if status:
            raise
        found = ("RUNNING", "")  # it succeeded: Slurm's answer would change nothing
    state, why = found or ("gone", "")
    if state != "RUNNING":
        # Slurm has decided, whatever srun returned (0 for a lost node). Requeueing would revive a cancelled job.
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
        if left_s is not None and left_s <= (signal_delay_s or 0) + scheduler.EARLY_S:
            return "stopped by the time limit", True
        if status - 128 == signal.SIGTERM:  # perhaps srun's own, after another rank had failed
            return "ended by SIGTERM before it had saved", True
        return INNOCENT[0], True
    return f"failed with status {status}", True


def requeue(job_id: str, record: Record, job: Job) -> str:
    """Put the job back into the queue unless its attempts gain nothing; return the outcome, in words."""
    if record.idle() >= job.max_requeues:
        return f"; {record.idle()} attempts in a row gained nothing: not requeued"
    if not record.write() and not record.attempts[-1].gained:  # write now: Slurm ends us once it requeues
        return "; it gained nothing and that cannot be recorded, so it might be requeued for ever: not requeued"
    try:
        patiently(lambda: scheduler.requeue(job_id))
    except SlurmError as error:
        return f"; not requeued: {error}. Submit it again: it continues from there"
    return "; requeued"


if __name__ == "__main__":
    run_program(main, lasting=True)
