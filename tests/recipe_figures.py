"""What the recipes in examples/recipes say of themselves, against what their plans say.

python tests/recipe_figures.py      writes the figures of today's plans into the recipes' comments
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
FACT = re.compile(r"^# (hardware|command|plan|memory|speed):(.*)$", re.MULTILINE)
GIB = 2**30


def recipes() -> list[Path]:
    return sorted(RECIPES.glob("*.yaml"))


def stated(recipe: Path) -> dict[str, str]:
    """The facts in a recipe's comments, by their names."""
    return {name: value.strip() for name, value in FACT.findall(recipe.read_text(encoding="utf-8"))}


def plan_of(recipe: Path) -> dict[str, Any]:
    """The plan that the command line makes of a recipe on the hardware that it names.

    Raises:
        CalledProcessError: it does not fit, or is no recipe.
    """
    hardware = f"--hardware={stated(recipe)['hardware']}"
    program = Path(sys.executable).with_name("parallel-tune")
    done = subprocess.run(
        [program, "plan", "--config", recipe.relative_to(ROOT), hardware, "--json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def planned(recipe: Path, plan: dict[str, Any]) -> dict[str, str]:
    """The facts that a plan gives, in the words of the comments."""
    processes, steps = plan["processes"], plan["gradient_accumulation_steps"]
    how = [
        f"{plan['strategy']}, {processes} process{'es' if processes > 1 else ''}",
        f"micro-batch {plan['micro_batch']} x {steps} x {processes} = {plan['global_batch']} rows a step",
        f"checkpointing {plan['gradient_checkpointing']}",
    ]
    if plan["lanes"] > 1:
        how.append(f"{plan['lanes']} lanes")
    if plan["captured"]:
        how.append("steps captured")
    devices = [
        f"{device['predicted_peak_bytes'] / GIB:.1f} GiB on device {device['index']} (layers {span(device['layers'])})"
        for device in plan["devices"]
    ]
    speed = float(f"{plan['predicted_tokens_per_second']:.2g}")
    return {
        "hardware": stated(recipe)["hardware"],
        "command": f"parallel-tune --config {recipe.relative_to(ROOT).as_posix()}",
        "plan": ", ".join(how),
        "memory": ", ".join(devices),
        "speed": f"about {speed:,.0f} tokens/s, rows full",
    }


def span(layers: list[int]) -> str:
    return f"{layers[0]}-{layers[1]}"


def renewed(text: str, facts: dict[str, str]) -> str:
    """A recipe's text with these facts in its comments."""
    return "\n".join(_line(line, facts) for line in text.split("\n"))


def _line(line: str, facts: dict[str, str]) -> str:
    fact = FACT.fullmatch(line)
    return f"# {fact[1] + ':':<9} {facts[fact[1]]}" if fact else line


def main() -> None:
    for recipe in recipes():
        facts = planned(recipe, plan_of(recipe))
        text = recipe.read_text(encoding="utf-8")
        fresh = renewed(text, facts)
        if fresh != text:
            recipe.write_text(fresh, encoding="utf-8")
            print(f"{recipe.relative_to(ROOT)}: renewed")


if __name__ == "__main__":
    main()
