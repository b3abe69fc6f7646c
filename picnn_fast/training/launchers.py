"""What torchrun, srun and variables set by hand say of the processes of a run, checked."""

import os
import re
from typing import ClassVar, NamedTuple

from picnn_fast._extras import extra
from picnn_fast.training.options import ConfigError

with extra("train"):
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

ADDRESS, PORT, NODE = "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"
DEFAULT_PORT = 29500  # torchrun's
# What is set within a step of srun, and not in a batch script outside of one.
_STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# What Lightning gives the processes that it starts itself beside the first of a machine.
_CHILD = (ADDRESS, PORT, NODE, "LOCAL_RANK", "WORLD_SIZE")


class Started(NamedTuple):
    """Where a launcher has put this process, and among how many.

    Attributes:
        name: of the launcher.
        environment: Lightning's view of it.
        devices: processes on each machine.
        nodes: machines.
    """

    name: str
    environment: ClusterEnvironment
    devices: int
    nodes: int


def from_outside() -> Started | None:
    """What started the processes before any knew of the run, if anything but the user did.

    Raises:
        ConfigError: variables that are missing, are no numbers, or contradict one another.
    """
    # torchrun first: srun may start one of it on each machine.
    if TorchElasticEnvironment.detect():
        return _by_torchrun()
    if _tasks() > 1 and not _outside_of_step():
        return _by_srun()
    return None


def is_child() -> bool:
    """Whether Lightning started this process, beside the first of its machine."""
    return all(os.environ.get(name) for name in _CHILD) and _integer("WORLD_SIZE") > 1


def own_node(nodes: int) -> int:
    """The place of this machine among so many that a user starts a process on each of.

    Raises:
        ConfigError: variables that say it, and where the first one is, are missing or wrong.
    """
    if is_child():
        return _integer(NODE)
    if nodes == 1:
        return 0
    for name in (NODE, ADDRESS):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name}: is not set with num_nodes {nodes}, want it on each machine: {NODE} from 0"
                f" to {nodes - 1}, {ADDRESS} the address of machine 0; or torchrun, or srun"
            )
    os.environ.setdefault(PORT, str(DEFAULT_PORT))
    _port(PORT)
    return _below(NODE, nodes, "machines")


class OwnLauncher(LightningEnvironment):
    """The user starts one process a machine, and it the others there."""

    def __init__(self, node: int) -> None:
        super().__init__()
        self._node = node

    @property
    def creates_processes_externally(self) -> bool:
        return is_child()

    def local_rank(self) -> int:
        # LOCAL_RANK may be left over from something else.
        return _integer("LOCAL_RANK") if is_child() else 0

    def node_rank(self) -> int:
        return self._node


class Srun(ClusterEnvironment):
    """The processes of a step of SLURM's, which Lightning's own class reads from the job alone.

    It takes no signal to requeue a job: a run that is started again goes on by itself.

    Args:
        ranks: this process among all, on its machine, and its machine, from 0.
        tasks: processes of the step.
        address: of the first machine.
        port: of the same.
    """

    name: ClassVar[str] = "srun"

    def __init__(self, ranks: tuple[int, int, int], tasks: int, address: str, port: int) -> None:
        super().__init__()
        self._rank, self._local, self._node = ranks
        self._tasks, self._address, self._port = tasks, address, port

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._address

    @property
    def main_port(self) -> int:
        return self._port

    @staticmethod
    def detect() -> bool:
        return _tasks() > 1 and not _outside_of_step()

    def world_size(self) -> int:
        return self._tasks

    def set_world_size(self, size: int) -> None:
        """SLURM has said it."""

    def global_rank(self) -> int:
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """SLURM has said it; with tasks dealt out in turn it is not what Lightning works out."""

    def local_rank(self) -> int:
        return self._local

    def node_rank(self) -> int:
        return self._node


def _by_torchrun() -> Started:
    for name in _TORCHRUN:
        if not os.environ.get(name):
            raise ConfigError(
                f"{name}: is not set though TORCHELASTIC_RUN_ID is, want both of torchrun, or"
                " neither"
            )
    world, local = _integer("WORLD_SIZE", 1), _integer("LOCAL_WORLD_SIZE", 1)
    if world % local:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE: got {local} of WORLD_SIZE {world}, want as many processes on each"
            " machine: the same --nproc-per-node"
        )
    _below("RANK", world, "processes")
    _below("LOCAL_RANK", local, "processes on each machine")
    return Started("torchrun", TorchElasticEnvironment(), local, world // local)


def _by_srun() -> Started:
    tasks = _tasks()
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name}: is not set with {tasks} tasks, want srun before the command, or"
                " --ntasks=1"
            )
    if os.environ.get("ENVIRONMENT") == "BATCH" and not any(map(os.environ.get, _STEP)):
        raise ConfigError(
            f"SLURM_NTASKS: got {tasks}, but the batch script started one process alone, want srun"
            " before the command, or --ntasks=1"
        )
    nodes_said, nodes = _first("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    said, each = _first(
        "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
    )
    if each is None:
        each = str(tasks // max(int(nodes), 1)) if nodes and nodes.isdecimal() else str(tasks)
    devices = _on_each(said, each)
    if tasks % devices or (nodes is not None and nodes != str(tasks // devices)):
        machines = "" if nodes is None else f" on {nodes} machines ({nodes_said})"
        raise ConfigError(
            f"{said or nodes_said}: got {each} with {tasks} tasks{machines}, want as many tasks on"
            " each machine: srun --nodes N --ntasks-per-node M"
        )
    ranks = (
        _below("SLURM_PROCID", tasks, "tasks"),
        _below("SLURM_LOCALID", devices, "tasks on each machine"),
        _below("SLURM_NODEID", tasks // devices, "machines"),
    )
    environment = Srun(ranks, tasks, _slurm_address(tasks // devices), _slurm_port())
    return Started(Srun.name, environment, devices, tasks // devices)


def _tasks() -> int:
    """Processes of the step, else of the job."""
    name, value = _first("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    return 1 if value is None else _integer(name, 1)


def _outside_of_step() -> bool:
    """In a shell of salloc's, which has the variables of the job and one process."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return interactive and not any(map(os.environ.get, _STEP))


def _first(*names: str) -> tuple[str, str | None]:
    """The first of these variables that is set, with its value."""
    return next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", None))


def _on_each(name: str, value: str) -> int:
    """Tasks on each machine, of ``2``, ``2(x3)`` or ``2(x3),2``."""
    parts = [re.fullmatch(r"(\d+)(?:\(x\d+\))?", part) for part in value.split(",")]
    counts = {int(part[1]) for part in parts if part is not None}
    if None in parts or 0 in counts:
        raise ConfigError(f"{name}: got {value!r}, want a number as 2, or 2(x3) for 3 machines")
    if len(counts) > 1:
        raise ConfigError(
            f"{name}: got {value!r}, want as many tasks on each machine: srun --ntasks-per-node"
        )
    return counts.pop()


def _slurm_address(nodes: int) -> str:
    """Of the machine of the first process, the first in the list."""
    if os.environ.get(ADDRESS):
        return os.environ[ADDRESS]
    _, listed = _first("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if listed is None:
        if nodes == 1:
            return "127.0.0.1"
        raise ConfigError(
            f"SLURM_STEP_NODELIST: is not set with {nodes} machines, want it, or {ADDRESS}"
        )
    # "gpu[03-05,9],big1" begins with gpu03.
    return re.split(r"[,\s]", re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", listed.strip()))[0]


def _slurm_port() -> int:
    """The same for all processes of a step, and another for the next one."""
    if os.environ.get(PORT):
        return _port(PORT)
    _, job = _first("SLURM_JOB_ID", "SLURM_JOBID")
    _, step = _first("SLURM_STEP_ID", "SLURM_STEPID")
    numbers = [int(value) if value and value.isdecimal() else 0 for value in (job, step)]
    return 15000 + (numbers[0] + 101 * numbers[1]) % 10000


def _integer(name: str, least: int = 0) -> int:
    value = os.environ[name]
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{name}: got {value!r}, want an integer >= {least}")
    return int(value)


def _below(name: str, limit: int, what: str) -> int:
    value = _integer(name)
    if value >= limit:
        raise ConfigError(f"{name}: got {value}, want less than {limit}, the {what}")
    return value


def _port(name: str) -> int:
    value = _integer(name, 1)
    if value > 65535:
        raise ConfigError(f"{name}: got {value}, want a port, at most 65535")
    return value
