"""What settings need beside the libraries that are always here: looked for before anything starts."""

from __future__ import annotations

from pathlib import Path

import click

from parallel_tune import export_after, trackers
from parallel_tune.config import TrainConfig
from parallel_tune.data.loading import local_files, read_text
from parallel_tune.engines import installed
from parallel_tune.unneeded import needs_bitsandbytes
from strategies.errors import ConfigError


def check_needs(config: TrainConfig, run: Path | None = None) -> None:
    """Refuse what would fail later: packages, programs, rights and data that the settings need and that are not there.

    Where there is a choice of them, say which it will be.

    Raises:
        ConfigError: something is missing.
    """
    trackers.check_installed(config.report_to)
    check_bitsandbytes(config)
    # Without it transformers takes the kernels of the package of that name, from the Hub.
    if config.attn_implementation == "flash_attention_2" and not (installed("flash_attn") or installed("kernels")):
        raise ConfigError(
            "attn_implementation = 'flash_attention_2' needs flash-attn, which is not installed",
            "`pip install flash-attn`, or leave the option out: sdpa has flash kernels of its own.",
        )
    if config.raw_text is not None and not Path(config.raw_text).expanduser().is_file():
        read_text(config.raw_text)  # says why
    if config.raw_text is None:
        # Processes read it when they have loaded the model.
        local_files(config.dataset, config.dataset_split, config.dataset_config)
    said = export_after.check_ahead(config, run)
    if said:
        click.echo(said)


def check_bitsandbytes(config: TrainConfig) -> None:
    """Refuse 4-bit weights and bitsandbytes' optimizers without bitsandbytes."""
    if needs_bitsandbytes(config) and not installed("bitsandbytes"):
        asked = "load_in_4bit" if config.load_in_4bit else f"optim = {config.optim!r}"
        raise ConfigError(f"{asked} needs bitsandbytes, which is not installed", "`pip install bitsandbytes`.")
