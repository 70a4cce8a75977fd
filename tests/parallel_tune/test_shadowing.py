"""Another package called `strategies` never takes the place of ours unnoticed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

DECOY = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"


def decoy(folder: Path, regular: bool = True) -> Path:
    package = folder / "strategies"
    package.mkdir()
    (package / ("__init__.py" if regular else "readme.txt")).write_text(DECOY)
    return package


def test_a_run_beside_a_decoy_does_not_see_it(ddp_run: Any) -> None:
    """The shared run of ddp was started in a folder whose own `strategies` ends every process that imports it."""
    decoys = ddp_run.run.parents[1] / "decoys" / "strategies" / "__init__.py"
    assert "SystemExit" in decoys.read_text()
    assert ddp_run.code == 0


def test_a_decoy_on_the_path_is_named(tune: Any, tmp_path: Path) -> None:
    package = decoy(tmp_path)
    for options in (["plan", "--model=gpt2"], ["--version"], ["resume", "x"]):
        ended = tune.ended(*options, base=False, env={"PYTHONPATH": str(tmp_path)})
        assert ended.code == 2
        assert f"another package named strategies, {package}, shadows the one of parallel-tune" in ended.err
        assert "PYTHONPATH" in ended.err
        assert "Traceback" not in ended.err
    assert not (package / "imported").exists()


@pytest.mark.parametrize("regular", [True, False])
def test_a_decoy_beside_python_dash_m_is_named_or_passed_over(regular: bool, tune: Any, tmp_path: Path) -> None:
    """`python -m` searches the working directory first. A folder without __init__.py may lose to ours."""
    package = decoy(tmp_path, regular)
    ended = tune.ended("--version", base=False, before=(sys.executable,), cwd=tmp_path)
    assert "Traceback" not in ended.err
    assert (ended.code == 2 and str(package) in ended.err) or (not regular and ended.code == 0)
    safe = tune.ended("--version", base=False, before=(sys.executable, "-P"), cwd=tmp_path)
    assert safe.code == 0


def test_the_command_line_knows_no_working_directory(tune: Any, tmp_path: Path) -> None:
    decoy(tmp_path)
    assert tune.ended("--version", base=False, cwd=tmp_path).code == 0
    assert [path.name for path in (tmp_path / "strategies").iterdir()] == ["__init__.py"]
