"""The refusal: replication and splitting may not meet, and this is found out before anything loads.

`model_parallel` is one process that holds all devices; `ddp` is one process per device. Under a launcher the number of
processes is already decided, so what started us is read from the environment. The variables are those that torchrun,
`accelerate launch` (1.15) and srun were seen to set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parallel_tune.planning import SPLITTING_MAPS, read_device_map
from strategies.errors import ConfigError, StrategiesCombined

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a process needs to join others; with only some of these it waits for ever."""

RANKS = RENDEZVOUS[:3]
TASK_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
}
"""Launchers with names of their own for RANK, LOCAL_RANK and WORLD_SIZE.

Not SLURM_NTASKS: in an sbatch batch step it is set although one process runs.
"""

DROPPED = (*RENDEZVOUS, "LOCAL_WORLD_SIZE", "NODE_RANK")
DROPPED_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")
HARMLESS = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH")
OTHER_SHARDING = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
"""Set by an `accelerate config` that shards the model in a way of its own."""


@dataclass(frozen=True)
class Launch:
    """What started this process together with others, or alone under a launcher.

    Attributes:
        launcher: e.g. "torchrun".
        environment: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torch.distributed wants them; empty
            where there is nobody to join.
        seen: the launcher's variables and their values.
    """

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    environment: Mapping[str, str]
    seen: Mapping[str, str]

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the launcher's variables: what to drop where one process goes on alone."""
        return tuple(self.seen)

    @property
    def dropping(self) -> str:
        """The line to print where one process goes on alone."""
        return (
            f"One process under {self.launcher}: going on without it. Dropped, since accelerate would obey them: "
            f"{', '.join(self.variables)}."
        )


def find_launch(environ: Mapping[str, str]) -> Launch | None:
    """What launcher started this process; None for a plain command.

    Raises:
        ConfigError: its variables are incomplete or contradict each other: whoever joined by them would wait for ever.
        StrategiesCombined: `accelerate launch` is configured for FSDP, DeepSpeed or the like, over several processes.
    """
    seen = {name: value for name, value in environ.items() if _is_launchers(name)}
    set_here = {name: environ[name] for name in RENDEZVOUS if environ.get(name, "") != ""}
    tasks = _tasks(environ)
    if tasks is not None and len(set_here) < len(RENDEZVOUS):
        return _from_tasks(environ, *tasks, set_here)
    if len(set_here) == len(RENDEZVOUS):
        launch = _from_rendezvous(environ, set_here, seen)
        if launch.world_size > 1:
            _refuse_other_sharding(launch)
        return launch
    accelerate = _any_prefix(seen, "ACCELERATE_")
    if any(name in set_here for name in RANKS) or (set_here and accelerate):
        raise _incomplete(set_here, seen)
    # An address alone, as cluster profiles export it, launches nothing.
    return Launch("accelerate launch", 0, 0, 1, {}, seen) if accelerate else None


def check_settings(strategy: str, device_map: str | None, launch: Launch | None = None) -> None:
    """Refuse replication and splitting together, before anything loads.

    Args:
        strategy: what the user asked for, "auto" included.
        device_map: the user's `--device_map`: a word such as "balanced", or a JSON file.
        launch: what started this process.

    Raises:
        StrategiesCombined: with what was seen and the two ways out.
        ConfigError: the device map cannot be read.
    """
    split_asked = device_map is not None and _splits(device_map)
    if strategy == "ddp" and split_asked:
        raise StrategiesCombined(
            f"--strategy ddp puts a whole replica on each device, and --device_map {device_map} asks to split one "
            "model over several. They cannot be combined.",
            "Leave out --device_map to replicate, or use --strategy model_parallel to split (its map is computed).",
        )
    if launch is not None and launch.world_size > 1 and (strategy == "model_parallel" or split_asked):
        asked = "--strategy model_parallel" if strategy == "model_parallel" else f"--device_map {device_map}"
        raise StrategiesCombined(
            f"{asked} splits one model over all devices inside one process, but {launch.launcher} started "
            f"{launch.world_size} processes ({_listed(launch.seen)}). They cannot be combined.",
            f"Run `parallel-tune --strategy model_parallel ...` without {launch.launcher} to split, or keep "
            f"{launch.launcher} and use --strategy ddp to replicate.",
        )


def _tasks(environ: Mapping[str, str]) -> tuple[str, tuple[str, str, str]] | None:
    """The task launcher that started several processes, with its names; None for one process or none of them."""
    for launcher, names in TASK_LAUNCHERS.items():
        size = environ.get(names[2], "")
        if size.isdigit() and int(size) > 1:
            return launcher, names
    return None


def _from_tasks(
    environ: Mapping[str, str], launcher: str, names: tuple[str, str, str], set_here: Mapping[str, str]
) -> Launch:
    seen = {name: environ[name] for name in names if name in environ} | dict(set_here)
    missing = [name for name in names if name not in environ]
    if missing:
        raise _incomplete(seen, seen, missing)
    ranks = dict(zip(RANKS, (environ[name] for name in names), strict=True))
    stale = {name: set_here[name] for name in RANKS if name in set_here and set_here[name] != ranks[name]}
    if stale:
        raise ConfigError(
            f"{launcher} says {_listed({name: environ[name] for name in names})}, but the environment also has "
            f"{_listed(stale)}, left from elsewhere.",
            f"unset {' '.join(stale)}",
        )
    # On one node every process can work out where rank 0 is; on several the job script must say.
    if launcher == "srun" and environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        port = 20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 20_000
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:
        address = {}
    address |= {name: set_here[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in set_here}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in address]
    if missing:
        raise _incomplete(seen, seen, missing)
    return _checked(launcher, ranks | address, seen)


def _from_rendezvous(environ: Mapping[str, str], set_here: Mapping[str, str], seen: Mapping[str, str]) -> Launch:
    if _any_prefix(seen, "ACCELERATE_"):
        launcher = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    else:
        launcher = "a launcher"
    return _checked(launcher, set_here, seen)


def _checked(launcher: str, environment: Mapping[str, str], seen: Mapping[str, str]) -> Launch:
    numbers = {}
    for name in (*RANKS, "MASTER_PORT"):
        value = environment[name]
        if not value.isdecimal():
            raise ConfigError(f"{name}={value!r} is not a number.", _UNSET_HINT)
        numbers[name] = int(value)
    rank, local_rank, world_size = (numbers[name] for name in RANKS)
    if not (rank < world_size and local_rank <= rank):
        raise ConfigError(
            f"the launcher's variables contradict each other: {_listed({n: environment[n] for n in RANKS})}.",
            _UNSET_HINT,
        )
    return Launch(launcher, rank, local_rank, world_size, dict(environment), dict(seen))


def _refuse_other_sharding(launch: Launch) -> None:
    on = {
        name: value
        for name, value in launch.seen.items()
        if name in OTHER_SHARDING and value.lower() in ("1", "true", "yes", "on")
    }
    if on:
        raise StrategiesCombined(
            f"accelerate launch is configured to shard the model in its own way ({_listed(on)}), which is neither ddp "
            "nor model_parallel. They cannot be combined.",
            "Run `parallel-tune ...` without accelerate launch, or use `accelerate launch --multi_gpu` with a "
            "configuration without sharding.",
        )


_UNSET_HINT = (
    f"Start parallel-tune by itself after `unset {' '.join(RENDEZVOUS)}`, or let torchrun, accelerate launch "
    "or srun set all of these."
)


def _incomplete(there: Mapping[str, str], seen: Mapping[str, str], missing: Iterable[str] | None = None) -> ConfigError:
    if missing is None:
        missing = [name for name in RENDEZVOUS if name not in there]
    shown = {name: value for name, value in seen.items() if name in there or name.startswith("ACCELERATE_USE_")}
    message = (
        f"the environment has only some of a launcher's variables: {_listed(shown)}; missing: {', '.join(missing)}. "
        "A process that tried to join others by these would wait for ever."
    )
    if not any(name in there for name in RANKS) and _any_prefix(seen, "ACCELERATE_"):
        # Seen: `accelerate launch --cpu --num_processes 2` starts one process, with an address and no rank.
        return ConfigError(
            message,
            "`accelerate launch --cpu --num_processes N` starts one process only. Start parallel-tune by itself, or "
            "use `accelerate launch --multi_gpu --num_processes N` (it works on a CPU too).",
        )
    return ConfigError(message, _UNSET_HINT)


def _splits(device_map: str) -> bool:
    devices = read_device_map(device_map) if device_map not in SPLITTING_MAPS else None
    if devices is None:
        return True
    # 0, "0", "cuda:0" and "cuda" are one device.
    names = {str(device).removeprefix("cuda").removeprefix(":") or "0" for device in devices.values()}
    return len(names) > 1


def _is_launchers(name: str) -> bool:
    return (name in DROPPED or name.startswith(DROPPED_PREFIXES)) and name not in HARMLESS


def _any_prefix(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _listed(variables: Mapping[str, str]) -> str:
    shown = {n: v for n, v in variables.items() if n in DROPPED or not n.startswith(DROPPED_PREFIXES)}
    # A launcher sets dozens; those that say how many processes there are come first, then what names the launcher.
    named = {n: v for n, v in variables.items() if n == "TORCHELASTIC_RUN_ID" or n.startswith("ACCELERATE_USE_")}
    return ", ".join(f"{name}={value}" for name, value in {**shown, **named}.items())
