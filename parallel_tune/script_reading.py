"""A user's script read, not run: a split under ddp, or a launcher inside, found with its line before it starts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel_tune.script_guard import shown, splits
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
    "torch.distributed.launcher.api.elastic_launch",
}
"""Functions that start training processes of their own."""

COMMANDS = re.compile(r"\b(torchrun|deepspeed|accelerate\s+launch|torch\.distributed\.(?:run|launch)|mpirun|srun)\b")
RUNS_COMMANDS = re.compile(
    r"(subprocess\.(run|call|check_call|check_output|Popen)|os\.(system|popen|exec\w+|spawn\w+))"
)
JOINS = {"torch.distributed.init_process_group", "torch.distributed.distributed_c10d.init_process_group"}


@dataclass(frozen=True)
class Finding:
    """Something in a script that decides how it may be launched.

    Attributes:
        kind: "split" (a device_map over several devices), "launcher", or "joins" (a process group).
        what: it, in a few words.
    """

    kind: str
    line: int
    what: str


@dataclass(frozen=True)
class Reading:
    """What a script says of itself.

    Attributes:
        models: names written out where a model is loaded.
    """

    path: Path
    findings: tuple[Finding, ...]
    models: tuple[str, ...]

    def split(self) -> Finding | None:
        """The first device_map that splits."""
        return next((finding for finding in self.findings if finding.kind == "split"), None)


def read_script(path: Path) -> Reading:
    """Read a script.

    Raises:
        ConfigError: it cannot be read, or is not Python.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(
            f"cannot read the script {path}: {error.strerror}", "Give an existing Python file."
        ) from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"{where}: not Python: {error}", "Correct the script; it has not been started.") from error
    names = _imported_names(tree)
    findings: list[Finding] = []
    models: list[str] = []
    for node in ast.walk(tree):
        findings += _maps(node)
        if isinstance(node, ast.Call):
            function = _dotted(node.func, names)
            findings += _launches(node, function)
            models += _models(node, function)
    return Reading(path, tuple(sorted(findings, key=lambda finding: finding.line)), tuple(dict.fromkeys(models)))


def check(reading: Reading, strategy: str) -> None:
    """Refuse a script that does by itself what the strategy excludes.

    Raises:
        StrategiesCombined: naming file and line, and the two ways out.
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


def _maps(node: ast.AST) -> Iterator[Finding]:
    """device_map=... in a call, "device_map": ... in a dict, options["device_map"] = ..."""
    values: list[ast.expr] = []
    if isinstance(node, ast.Call):
        values = [keyword.value for keyword in node.keywords if keyword.arg == "device_map"]
    elif isinstance(node, ast.Dict):
        values = [value for key, value in zip(node.keys, node.values, strict=True) if _is_text(key, "device_map")]
    elif isinstance(node, ast.Assign):
        targets = [target for target in node.targets if isinstance(target, ast.Subscript)]
        values = [node.value for target in targets if _is_text(target.slice, "device_map")]
    for value in values:
        device_map = _literal_map(value)
        if splits(device_map):
            yield Finding("split", value.lineno, f"device_map={shown(device_map)}")


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


def _launches(call: ast.Call, function: str) -> Iterator[Finding]:
    if function in LAUNCHERS:
        yield Finding("launcher", call.lineno, f"{function}()")
    elif function in JOINS:
        yield Finding("joins", call.lineno, f"{function}()")
    elif RUNS_COMMANDS.fullmatch(function):
        command = COMMANDS.search(" ".join(_texts(call)))
        if command:
            yield Finding("launcher", call.lineno, f"{function}() with {command[0]}")


def _models(call: ast.Call, function: str) -> Iterator[str]:
    """FastLanguageModel.from_pretrained("name"), and TRL's SFTTrainer(model="name"); tokenizers aside."""
    *_, owner, name = ("", *function.split("."))
    values: list[ast.expr] = []
    if name == "from_pretrained" and "Model" in owner:
        words = ("model_name", "pretrained_model_name_or_path")
        values = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg in words)]
    elif name.endswith("Trainer"):
        values = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg == "model")]
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """Name in the script -> dotted name that it stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(function: ast.expr, names: dict[str, str]) -> str:
    """The full name of a called function, or an empty text."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    return ".".join([names.get(function.id, function.id), *reversed(parts)])


def _texts(call: ast.Call) -> Iterator[str]:
    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _is_text(node: ast.expr | None, text: str) -> bool:
    return isinstance(node, ast.Constant) and node.value == text
