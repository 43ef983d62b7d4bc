"""The command line of slurm.launch, and which option belongs to whom.

One flat line of `key=value`, as for every program. Keys of `LaunchConfig` are the launcher's, sbatch's long options are
sbatch's, and the rest is the program's, which refuses unknown keys. `then=PROGRAM` begins the next job.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from slurm.job import JobConfig
from slurm.programs import Program, find_program
from slurm.scheduler import seconds_of
from train.config import load_config


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    program: str = "train.pretrain"  # what to run; its own options follow as key=value, config=FILE among them
    nodes: int = 1  # of the job
    gpus_per_node: str | None = None  # GPUs of a node, one task each: 8 or TYPE:8; null: none, tasks run on CPUs
    tasks_per_node: int | None = None  # null: one per GPU, or 1 without GPUs
    cpus_per_task: int | None = None  # cores of a task, including its data workers; null: the cluster's default
    time: str | None = None  # limit, as sbatch takes it: minutes, HOURS:MINUTES:SECONDS, DAYS-HOURS; null: the default
    # Seconds before the time limit (and before a preemption, where Slurm is configured so) at which the ranks are
    # signalled to save: more than a step and two saves take. The job is then requeued and continues.
    signal_delay: int = 300
    # Elements of a job array, of train.encode: N or N%M, at most M at once; null: no array.
    array: str | None = None
    # Attempts in a row without progress before it gives up; a preempted one counts a tenth.
    max_requeues: int = JobConfig.max_requeues
    then: str | None = None  # program of the next job, which starts when this one is done; its options follow
    dry_run: bool = False  # print the batch scripts; read no data, submit and write nothing
    plan: bool = True  # refuse a training that does not fit according to train.plan
    gpu: str = "h100"  # for the plan: a name that train.plan knows
    setup: list[str] = field(default_factory=list)  # commands that the batch script runs first: [module load cuda]
    env: dict[str, str] = field(default_factory=dict)  # variables of every task, such as env.NCCL_SOCKET_IFNAME=ib0
    # Further sbatch options. Known ones need no prefix: partition=, account=, qos=, exclude=, mail_type= ...
    sbatch: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "signal_delay": 0, "max_requeues": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value}: expected at least {smallest}")
        if self.gpus_per_node is not None and self.num_gpus < 1:
            raise ValueError(f"gpus_per_node={self.gpus_per_node}: expected a count such as 8, or TYPE:8")
        if self.num_gpus and self.tasks_per_node not in (None, self.num_gpus):
            given = f"tasks_per_node={self.tasks_per_node} with gpus_per_node={self.gpus_per_node}"
            raise ValueError(f"{given}: expected one task a GPU; leave tasks_per_node out")
        limit_s = seconds_of(self.time or "")
        if limit_s is not None and limit_s <= self.signal_delay:
            raise ValueError(
                f"time={self.time} is not longer than signal_delay={self.signal_delay} seconds: the job would be "
                "signalled to stop as it starts; give more time, or a smaller signal_delay"
            )
        elements, limit = self.elements
        if self.array is not None and (not 2 <= elements <= MOST or limit < 1):
            expected = f"N or N%M, N at least 2 elements, at most {MOST:,}, and M at least 1 at once"
            raise ValueError(f"array={self.array}: expected {expected}")
        own = {field.name: f"give {field.name}= itself" for field in dataclasses.fields(self)}
        for given, value in self.sbatch.items():
            if why := (own | TAKEN).get(given.replace("-", "_")):
                raise ValueError(f"{given}={value}: {why}")
        for name in self.env:
            if not (name.isascii() and name.isidentifier()):
                raise ValueError(f"env.{name}: not a valid name of a variable")
        program = self.found
        if self.array is not None and program.tasks != "workers":
            raise ValueError(f"array={self.array}: {self.program} is one job; arrays are for train.encode")
        if program.tasks == "one" and self.nodes * self.tasks > 1:
            raise ValueError(f"{self.program} is one task: leave nodes, tasks_per_node and gpus_per_node above 1 out")

    @property
    def found(self) -> Program:
        return find_program(self.program)

    @property
    def num_gpus(self) -> int:
        """GPUs of a node; 0 for none, or where it is not a number."""
        count = (self.gpus_per_node or "0").rpartition(":")[2]
        return int(count) if count.isdecimal() else 0

    @property
    def tasks(self) -> int:
        """Tasks of a node."""
        return self.tasks_per_node or self.num_gpus or 1

    @property
    def elements(self) -> tuple[int, int]:
        """Elements of the array and how many of them run at once; (1, 1) without an array."""
        if self.array is None:
            return 1, 1
        count, _, limit = self.array.partition("%")
        at_once = limit or "64"
        return (int(count), int(at_once)) if count.isdecimal() and at_once.isdecimal() else (0, 0)


MOST = 100_000  # elements; each is a file first. sbatch itself takes 1,000, or its MaxArraySize
# sbatch's long options that are compatible with these jobs (22.05 to 25.05).
SBATCH_NAMES = """
account acctg_freq begin bell bb bbf clusters comment constraint container contiguous core_spec cores_per_socket
cpu_freq cpus_per_gpu deadline delay_boot dependency distribution exclude exclusive extra extra_node_info get_user_env
gpu_bind gpu_freq gres gres_flags hint hold job_name licenses mail_type mail_user mcs_label mem mem_bind mem_per_cpu
mem_per_gpu mincpus network nice nodefile nodelist no_kill oom_kill_step overcommit oversubscribe partition power
prefer priority propagate qos reboot reservation segment sockets_per_node spread_job switches thread_spec
threads_per_core time_min tmp tres_bind tres_per_task use_min_nodes wait_all_nodes wckey
"""
SBATCH = frozenset(SBATCH_NAMES.split())
# Those that would break a job, and the remedy.
TAKEN = {
    **dict.fromkeys(("ntasks", "ntasks_per_node"), "give tasks_per_node or gpus_per_node"),
    **dict.fromkeys(("ntasks_per_gpu", "gpus", "gpus_per_socket"), "give gpus_per_node, one task each"),
    "gpus_per_task": "give gpus_per_node, one task each: a GPU that its peers cannot see slows NCCL down",
    **dict.fromkeys(("output", "error"), "logs go into the run's folder"),
    "open_mode": "logs are appended to",
    "signal": "give signal_delay=SECONDS",
    **dict.fromkeys(("requeue", "no_requeue"), "jobs may always be requeued; max_requeues bounds it"),
    "chdir": "paths are relative to the current folder: change to that folder first",
    "wrap": "give program=",
    "kill_on_invalid_dep": "a job whose predecessor failed is always cancelled",
    "wait": "after submission, run the tail -F command that is printed",
}
# What a job of a chain does not inherit from the previous one.
OWN = {
    *("program", "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time", "array"),
    *("begin", "dependency", "job_name", "mem", "mem_per_cpu", "mem_per_gpu", "nodelist", "gres", "exclusive"),
}


def read(argv: Sequence[str]) -> list[tuple[LaunchConfig, list[str]]]:
    """Return the jobs of a command line, each with its program's arguments. Raises ValueError."""
    groups: list[list[str]] = [[]]
    inherited: list[str] = []
    for argument in argv:
        key, _, value = argument.partition("=")
        if key == "then":
            groups.append([f"program={value}"])
        else:
            (inherited if key == "dry_run" else groups[-1]).append(argument)  # wherever it stands, it is for all
    jobs = []
    for group in groups:
        ours, theirs = sort(group)
        jobs.append((load_config(LaunchConfig, [*inherited, *ours]), theirs))
        inherited = [a for a in [*inherited, *ours] if a.partition("=")[0].removeprefix("sbatch.") not in OWN]
    return jobs


def sort(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into the launcher's, with sbatch's as `sbatch.NAME=VALUE`, and the program's."""
    fields = {field.name for field in dataclasses.fields(LaunchConfig)}
    ours, theirs = [], []
    for argument in arguments:
        key = argument.partition("=")[0].split(".")[0]
        if key in fields:
            ours.append(argument)
        elif key.replace("-", "_") in (SBATCH | TAKEN.keys()) - {"output"}:  # an option of programs, too
            name, _, value = argument.partition("=")
            ours.append(f"sbatch.{name.replace('-', '_')}={value}")
        else:
            theirs.append(argument)
    return ours, theirs
