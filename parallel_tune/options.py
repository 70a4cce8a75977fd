"""Command-line options made from the fields of TrainConfig, and help in groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import click

from parallel_tune.config import TrainConfig

TOKENS = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["--help", "-h"]}


class GroupedOption(click.Option):
    """An option that knows its help group and whether short help shows it."""

    def __init__(self, *args: Any, group: str = "Other", basic: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.basic = basic


class GroupedHelp(click.Command):
    """A command whose help shows the basic options, or all of them under `--help-all`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        everything = bool(ctx.meta.get("help_all"))
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and (everything or getattr(parameter, "basic", True)):
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def show_all_help(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Print the long help and leave."""
    if value:
        ctx.meta["help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def train_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command one option per setting; only those that the user gave reach the command."""
    hints = get_type_hints(TrainConfig)
    for item in reversed(dataclasses.fields(TrainConfig)):
        command = _option(item, hints[item.name])(command)
    command = click.option(
        "--config", "config_file", type=click.Path(dir_okay=False), cls=GroupedOption, group="Other",
        help="Recipe in YAML; options on the command line win over it.",
    )(command)  # fmt: skip
    return click.option(
        "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=show_all_help, cls=GroupedOption,
        help="Show every option.",
    )(command)  # fmt: skip


def some_train_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a click command the options of these settings only."""
    hints = get_type_hints(TrainConfig)
    by_name = {item.name: item for item in dataclasses.fields(TrainConfig)}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = _option(by_name[name], hints[name])(command)
        return command

    return decorate


def _option(item: dataclasses.Field[Any], hint: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    default = item.default if item.default is not dataclasses.MISSING else None
    shown = "" if default is None or isinstance(default, bool) else f"  [default: {default}]"
    kind = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
    names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
    common: dict[str, Any] = {
        "default": None,
        "cls": GroupedOption,
        "group": item.metadata["group"],
        "basic": item.metadata["basic"],
        "help": item.metadata["help"] + shown,
    }
    if kind is bool:
        names[0] = f"--{item.name}/--no_{item.name}"
        return click.option(*names, item.name, **common)
    if item.metadata["choices"]:
        return click.option(*names, item.name, type=click.Choice(item.metadata["choices"]), **common)
    return click.option(*names, item.name, type=kind if kind in (int, float) else str, **common)


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user named."""
    return {name: value for name, value in values.items() if value is not None}
