"""A user's script read, not run: a split under ddp, or a launcher inside, found with its line before it starts.

What stands under a condition that looks at the processes is left to the guard, which sees what the script then does.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallel_tune.script_guard import shown, splits
from parallel_tune.script_names import Conditions, Names, asks_for_processes, walk
from strategies.errors import ConfigError, StrategiesCombined

LAUNCHERS = {
    "accelerate.notebook_launcher",
    "accelerate.launchers.notebook_launcher",
    "accelerate.debug_launcher",
    "torch.multiprocessing.spawn",
    "torch.multiprocessing.spawn.spawn",
    "torch.multiprocessing.start_processes",
    "torch.distributed.run.main",
    "torch.distributed.run.run",
    "torch.distributed.launch.main",
    "torch.distributed.launcher.elastic_launch",
    "torch.distributed.launcher.api.elastic_launch",
    "accelerate.commands.launch.main",
    "accelerate.commands.launch.launch_command",
}
"""Functions that start training processes of their own."""

COMMANDS = re.compile(r"\b(torchrun|deepspeed|accelerate\s+launch|torch\.distributed\.(?:run|launch)|mpirun|srun)\b")
RUNS_COMMANDS = re.compile(
    r"(subprocess\.(run|call|check_call|check_output|Popen)|os\.(system|popen|exec\w+|spawn\w+))"
)
JOINS = {"torch.distributed.init_process_group", "torch.distributed.distributed_c10d.init_process_group"}
REPLICATES = {"torch.nn.DataParallel", "torch.nn.parallel.DataParallel"}
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
VISIBLE = "CUDA_VISIBLE_DEVICES"
SIZES = ("load_in_4bit", "full_finetuning", "max_seq_length")
"""What loaders are told that decides how much memory a training takes, under the names of our own settings."""
UNSLOTH_LOADERS = ("FastLanguageModel", "FastModel")


STARTERS = re.compile(r"(python[\d.]*|torchrun|accelerate|deepspeed)(\.exe)?")
"""Commands that start scripts, where a script's name is expected."""


@dataclass(frozen=True)
class Finding:
    """Something in a script that decides how it may be launched.

    Attributes:
        kind: "split" (a device_map over several devices), "launcher", "joins" (a process group), "replicates" (over
            several GPUs in one process), or "sets" (an environment variable that says where a process stands).
        what: it, in a few words.
        name: the variable's.
    """

    kind: str
    line: int
    what: str
    name: str = ""


@dataclass(frozen=True)
class Reading:
    """What a script says of itself.

    Attributes:
        models: names written out where a model is loaded.
        loads: how it is loaded, as far as that is written out, in one way only, and not off: SIZES by their names.
    """

    path: Path
    findings: tuple[Finding, ...]
    models: tuple[str, ...]
    loads: Mapping[str, bool | int] = field(default_factory=dict)

    def split(self) -> Finding | None:
        """The first device_map that splits."""
        return next((finding for finding in self.findings if finding.kind == "split"), None)


def read_script(path: Path) -> Reading:
    """Read a script.

    Raises:
        ConfigError: it cannot be read, or is not Python.
    """
    if path.suffix == ".ipynb":  # its JSON may well be Python
        raise ConfigError(
            f"{path} is a notebook, and a script is run",
            f"`jupyter nbconvert --to script {shlex.quote(str(path))}` makes a script of it; lines of magic as %pip "
            "must go.",
        )
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        command = STARTERS.fullmatch(path.name)
        hint = f"Leave {path} away: the script is started for you." if command else "Give an existing Python file."
        raise ConfigError(f"cannot read the script {path}: {error.strerror}", hint) from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{where}: not Python: {error}", "Correct the script; it has not been started.") from error
    names = Names(tree)
    findings: list[Finding] = []
    models: list[str] = []
    loads: list[tuple[str, bool | int | None]] = []
    for node, conditions in walk(tree):
        if isinstance(node, ast.Call):
            function = names.dotted(node.func)
            findings += _launches(node, function, names)
            models += _models(node, function, names)
            loads += _sizes(node, function, names)
        if not asks_for_processes(conditions):
            findings += _maps(node, names)
            findings += [found for found in _places(node, names) if not _looked_at(found.name, conditions)]
    once = {name: value for name in SIZES if (value := _only({said for other, said in loads if other == name}))}
    ordered = tuple(sorted(findings, key=lambda finding: finding.line))
    return Reading(path, ordered, tuple(dict.fromkeys(models)), once)


def check_order(path: Path, arguments: Sequence[str], given: Collection[str]) -> None:
    """Refuse what is meant for the launch and stands behind the script, which never heard of it.

    Args:
        arguments: the script's.
        given: names of options before the script.

    Raises:
        ConfigError: the strategy or the hardware would have been passed over.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    for word in arguments:
        for name in ("strategy", "hardware"):
            if word.partition("=")[0] == f"--{name}" and name not in text and name not in given:
                raise ConfigError(
                    f"--{name} stands behind {path} and so goes to the script, which does not mention it",
                    f"Write it before the script: parallel-tune launch --{name} ... {path} ...",
                )


def check(reading: Reading, strategy: str, gpus: int = 0) -> None:
    """Refuse a script that does by itself what the strategy excludes.

    Args:
        strategy: "auto" while it is not decided.
        gpus: how many the script will run on.

    Raises:
        StrategiesCombined: naming file and line, and the two ways out.
        ConfigError: the script hides GPUs that it would run on.
    """
    for finding in reading.findings:
        where = f"{reading.path}:{finding.line}: {finding.what}"
        if finding.kind == "split" and strategy == "ddp":
            raise StrategiesCombined(
                f"{where} splits one model over several devices, and --strategy ddp puts a whole replica on each. "
                "They cannot be combined.",
                "Leave out device_map to replicate (each process gets its device), or launch with "
                "--strategy model_parallel to split.",
            )
        if finding.kind == "launcher":
            raise StrategiesCombined(
                f"{where} starts processes of its own, and parallel-tune launch places the processes of "
                f"--strategy {strategy}. They cannot be combined.",
                "Call the training function directly and let parallel-tune launch it, or run the script by itself: "
                f"python {reading.path}.",
            )
        if finding.kind == "joins" and strategy == "model_parallel":
            raise StrategiesCombined(
                f"{where} joins several processes, and --strategy model_parallel is one process that holds all "
                "devices. They cannot be combined.",
                "Leave the process group out to split, or launch with --strategy ddp to replicate.",
            )
        if finding.kind == "replicates" and gpus > 1 and strategy != "auto":
            raise StrategiesCombined(
                f"{where} copies the model to all GPUs from within one process, and --strategy {strategy} places it "
                "itself. They cannot be combined.",
                "Leave the wrapper out: ddp replicates by processes, model_parallel splits.",
            )
        if finding.kind == "sets":
            _check_variable(finding, where, strategy, gpus)


def _check_variable(finding: Finding, where: str, strategy: str, gpus: int) -> None:
    if finding.name == VISIBLE and gpus > 1:
        raise ConfigError(
            f"{where} chooses GPUs inside the script, after parallel-tune launch gave it {gpus}",
            f"Leave it out, and choose outside: {VISIBLE}=0 parallel-tune launch ...",
        )
    if strategy == "ddp" and finding.name in (*RANKS, *ADDRESS):
        raise StrategiesCombined(
            f"{where} overwrites what tells each process of --strategy ddp which one it is. They cannot be combined.",
            f"Leave it out, or write os.environ.setdefault({finding.name!r}, ...), which keeps what is there.",
        )
    if strategy == "model_parallel" and finding.name in RANKS:
        raise StrategiesCombined(
            f"{where} lets accelerate look for other processes, and --strategy model_parallel is one process that "
            "holds all devices. They cannot be combined.",
            "Leave it out to split, or launch with --strategy ddp to replicate.",
        )


def _maps(node: ast.AST, names: Names) -> Iterator[Finding]:
    """device_map=... in a call, "device_map": ... in a dict, options["device_map"] = ..., options.device_map = ..."""
    values: list[ast.expr] = []
    if isinstance(node, ast.Call):
        values = [keyword.value for keyword in node.keywords if keyword.arg == "device_map"]
        function = names.dotted(node.func).rpartition(".")[2]
        place = {"setdefault": 0, "setattr": 1}.get(function)
        if place is not None and len(node.args) == place + 2 and _is_text(node.args[place], "device_map"):
            values.append(node.args[place + 1])
    elif isinstance(node, ast.Dict):
        values = [value for key, value in zip(node.keys, node.values, strict=True) if _is_text(key, "device_map")]
    elif isinstance(node, ast.Assign):
        values = [node.value for target in node.targets if _is_device_map(target)]
    for value in values:
        device_map = _literal_map(names.value(value))
        if splits(device_map):
            yield Finding("split", value.lineno, f"device_map={shown(device_map)}")


def _is_device_map(target: ast.expr) -> bool:
    if isinstance(target, ast.Subscript):
        return _is_text(target.slice, "device_map")
    return isinstance(target, ast.Attribute) and target.attr == "device_map"


def _literal_map(value: ast.expr) -> object:
    """A map as far as it is written out; devices that are not constants are left out."""
    if isinstance(value, ast.Constant):
        return value.value
    if isinstance(value, ast.Dict):
        pairs = zip(value.keys, value.values, strict=True)
        return {
            key.value: device.value
            for key, device in pairs
            if isinstance(key, ast.Constant) and isinstance(device, ast.Constant)
        }
    return None


def _launches(call: ast.Call, function: str, names: Names) -> Iterator[Finding]:
    if function in LAUNCHERS:
        yield Finding("launcher", call.lineno, f"{function}()")
    elif RUNS_COMMANDS.fullmatch(function):
        command = COMMANDS.search(" ".join(_texts(call, names)))
        if command:
            yield Finding("launcher", call.lineno, f"{function}() with {command[0]}")


def _places(node: ast.AST, names: Names) -> Iterator[Finding]:
    """Process groups, replication inside one process, and variables that say where a process stands."""
    variables: list[ast.expr | None] = []
    if isinstance(node, ast.Call):
        function = names.dotted(node.func)
        if function in JOINS:
            yield Finding("joins", node.lineno, f"{function}()")
        elif function in REPLICATES:
            yield Finding("replicates", node.lineno, f"{function}()")
        elif function == "os.putenv":
            variables = [*node.args[:1]]
        elif function == "os.environ.update":
            given = [names.value(argument) for argument in node.args]
            variables = [key for written in given if isinstance(written, ast.Dict) for key in written.keys]
            variables += [ast.Constant(keyword.arg) for keyword in node.keywords]
    elif isinstance(node, ast.Assign):
        targets = [target for target in node.targets if isinstance(target, ast.Subscript)]
        variables = [target.slice for target in targets if names.dotted(target.value) == "os.environ"]
    for variable in variables:
        name = variable.value if isinstance(variable, ast.Constant) else None
        if name in (*RANKS, *ADDRESS, VISIBLE):
            yield Finding("sets", getattr(node, "lineno", 0), f"os.environ[{name!r}] = ...", str(name))


def _looked_at(variable: str, conditions: Conditions) -> bool:
    """Whether a variable is set only after a look at what it is."""
    return variable != "" and any(variable in ast.unparse(test) for test in conditions)


def _models(call: ast.Call, function: str, names: Names) -> Iterator[str]:
    """FastLanguageModel.from_pretrained("name"), and TRL's SFTTrainer(model="name"); tokenizers aside."""
    *_, owner, name = ("", *function.split("."))
    values: list[ast.expr] = []
    if name == "from_pretrained" and "Model" in owner:
        words = ("model_name", "pretrained_model_name_or_path")
        values = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg in words)]
    elif name.endswith("Trainer"):
        values = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "model")]
    for value in map(names.value, values):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def _sizes(call: ast.Call, function: str, names: Names) -> Iterator[tuple[str, bool | int | None]]:
    """What a call that loads a model says of SIZES; None for a value that is not written out.

    Unsloth's loaders load in 4 bit where nothing else is said.
    """
    *_, owner, name = ("", *function.split("."))
    given = {keyword.arg: names.value(keyword.value) for keyword in call.keywords}
    if name == "from_pretrained" and owner in UNSLOTH_LOADERS:
        other = any(str(word).startswith("load_in_") or word in (None, "full_finetuning") for word in given)
        if "load_in_4bit" not in given and not other:
            yield "load_in_4bit", True
    elif name != "BitsAndBytesConfig":
        return
    for word in SIZES:
        if word in given:
            value = given[word]
            yield word, value.value if isinstance(value, ast.Constant) and isinstance(value.value, int) else None


def _only(said: set[bool | int | None]) -> bool | int | None:
    """What was said, if it is one thing; a setting that is off or no number is as if nothing was said."""
    one = said.pop() if len(said) == 1 else None
    return one if one is not None and one > 0 else None


def _texts(call: ast.Call, names: Names) -> Iterator[str]:
    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
        for node in ast.walk(names.value(argument)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _is_text(node: ast.expr | None, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text
