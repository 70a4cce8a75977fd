"""What a measured constant of a machine depends on: the GPU model and the software below the tensors."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

ABSENT = "none"


@dataclass(frozen=True)
class MachineKey:
    """A GPU model and its software stack; constants of one say nothing of another.

    Attributes:
        gpu: the name that NVML gives.
        driver: version of NVIDIA's driver.
        cuda: version of CUDA that torch was built for.
    """

    gpu: str
    driver: str
    torch: str
    cuda: str
    bitsandbytes: str

    @property
    def file_name(self) -> str:
        """A name for files about this machine. Two keys may share one, so the files hold the key too."""
        return "_".join(re.sub(r"[^A-Za-z0-9.+]+", "-", part) for part in astuple(self))

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.gpu}, driver {self.driver}, torch {self.torch}, CUDA {self.cuda}"


def machine_key(gpu: str, driver: str) -> MachineKey:
    """The key of a GPU here. torch is not imported: that takes seconds, and a plan has less than one."""
    torch, cuda = torch_versions()
    try:
        bitsandbytes = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        bitsandbytes = ABSENT
    return MachineKey(gpu, driver, torch, cuda, bitsandbytes)


def cpu_key() -> MachineKey:
    """The key of this machine's CPU, by its model and the cores that this process may use."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    return machine_key(model, f"{len(os.sched_getaffinity(0))} cores")


@lru_cache(maxsize=1)
def torch_versions() -> tuple[str, str]:
    """torch's own version and its CUDA's, read from the file in which torch's build wrote them down."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ABSENT, ABSENT
    found: dict[str, str] = {}
    path = Path(spec.origin).with_name("version.py")
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[target.id] = value.value
    return found.get("__version__", ABSENT), found.get("cuda", ABSENT)
