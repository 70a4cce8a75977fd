"""What a person sees of a run in the terminal, from the rows of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


class MetricsFollower:
    """Prints each new row of a metrics file as a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def poll(self) -> None:
        """Print the rows that were added since the last call."""
        try:
            with self._path.open(encoding="utf-8") as file:
                file.seek(self._position)
                text = file.read()
        except OSError:
            return
        complete, newline, _ = text.rpartition("\n")
        if newline:
            self._position += len((complete + newline).encode())
            for line in complete.splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # torn when its writer died
                click.echo(format_row(row))


def format_row(row: dict[str, Any]) -> str:
    """One row for people."""
    if "eval_loss" in row:
        return f"step {row['step']:>5}          held-out loss {row['eval_loss']:.4f}"
    left = (row["max_steps"] - row["step"]) * row["seconds"]
    rate = row["tokens_per_second"]
    return (
        f"step {row['step']:>5}/{row['max_steps']:<5}    loss {row['loss']:.4f}   "
        f"lr {row['learning_rate']:.2e}   {rate or 0:>8,.0f} tok/s   {duration(left)} left"
    )


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}h{minutes % 60:02d}"


def summary(report: dict[str, Any], run: Path) -> str:
    """The end of a run: what came out, and memory predicted against measured."""
    lines = [
        "",
        f"{report['strategy']} with {report['engine']}: {report['steps']} steps, {report['samples']} samples, "
        f"{report['tokens']:,} tokens in {duration(report['seconds'])}, {report['tokens_per_second'] or 0:,.0f} tok/s",
    ]
    if "held_out_loss_before" in report:
        before, after = report["held_out_loss_before"], report["held_out_loss_after"]
        lines.append(f"held-out loss {before:.4f} -> {after:.4f}")
    measured = [device for device in report["devices"] if "allocated_peak_bytes" in device]
    if measured:
        lines.append(
            f"{'device':<8}{'predicted':>12}{'in use':>12}{'off by':>9}{'tensors':>12}{'predicted':>12}{'off by':>9}"
        )
        for device in measured:
            used, allocated = device["used_peak_bytes"], device["allocated_peak_bytes"]
            predicted_used, predicted = device["predicted_peak_bytes"], device["predicted_allocated_bytes"]
            lines.append(
                f"{device['index']:<8}{gib(predicted_used):>12}{gib(used):>12}{predicted_used / used - 1:>+9.1%}"
                f"{gib(allocated):>12}{gib(predicted):>12}{predicted / allocated - 1:>+9.1%}"
            )
    lines.append(f"result: {run / report['result']}")
    return "\n".join(lines)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
