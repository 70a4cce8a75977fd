"""Command-line options made from the fields of TrainConfig, and help in groups."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args, get_type_hints

import click

from parallel_tune.completion import completer
from parallel_tune.config import TrainConfig
from parallel_tune.elsewhere import refuse_foreign

TOKENS = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["--help", "-h"]}
LAST_GROUP = "Other"
FIRST_GROUP = "Strategy and hardware"
LONGEST_METAVAR = 50
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class GroupedOption(click.Option):
    """An option that knows its help group, whether short help shows it, and whether it takes several words."""

    def __init__(
        self, *args: Any, group: str = LAST_GROUP, basic: bool = True, several: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.basic = basic
        self.several = several

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """As click's, under the option's own name alone: the other names that it takes would drown it."""
        record = super().get_help_record(ctx)
        if record is None or self.name is None or f"--{self.name}" not in self.opts:
            return record
        if self.is_flag:
            return f"--{self.name}", record[1]
        metavar, text = self.make_metavar(ctx), record[1]
        if isinstance(self.type, click.Choice) and len(metavar) > LONGEST_METAVAR:
            metavar, text = "NAME", f"{text}  One of {', '.join(self.type.choices)}."
        return f"--{self.name} {metavar}", text


class Words(click.Choice):  # type: ignore[type-arg]
    """A choice that knows other words for its values."""

    def __init__(self, choices: tuple[str, ...], synonyms: Mapping[str, str]) -> None:
        super().__init__(choices)
        self._synonyms = synonyms

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value itself, or the one that it is another word for."""
        return super().convert(self._synonyms.get(str(value).lower(), value), param, ctx)


class HomePath(click.Path):
    """A path in which ~ is the home: bash and zsh leave it as it is in `--output=~/folder`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path with the home written out."""
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - as config.py does


class GroupedHelp(click.Command):
    """A command whose help shows the basic options, or all of them under `--help-all`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_groups(ctx, self.get_params(ctx), formatter)


def write_groups(ctx: click.Context, parameters: Iterable[click.Parameter], formatter: click.HelpFormatter) -> None:
    """Options by their groups; a positional argument is in the usage line already."""
    everything = bool(ctx.meta.get("help_all"))
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
        if record and (everything or getattr(parameter, "basic", True)):
            groups.setdefault(getattr(parameter, "group", LAST_GROUP), []).append(record)
    for name, records in sorted(groups.items(), key=lambda group: (group[0] == LAST_GROUP, group[0] != FIRST_GROUP)):
        with formatter.section(name):
            formatter.write_dl(records)


class SettingsCommand(GroupedHelp):
    """A command of options alone, which takes them as other tools write them: `--bf16 true`, `--report_to a b`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Bring such words into click's form first."""
        by_name = {name: item for item in self.params if isinstance(item, GroupedOption) for name in item.opts}
        joined: list[str] = []
        rest = ["--config", *args] if args and is_recipe(args[0]) else list(args)
        while rest:
            word = rest.pop(0)
            option = by_name.get("--" + word[2:].replace("-", "_")) if word.startswith("--") else None
            if option is not None and option.is_flag and rest and rest[0].lower() in TRUTH and option.secondary_opts:
                word = option.opts[0] if TRUTH[rest.pop(0).lower()] else option.secondary_opts[0]
            if option is None and word.startswith("--") and not ctx.resilient_parsing:
                refuse_foreign(word[2:].partition("=")[0].replace("-", "_"))
            joined.append(word)
            if option is not None and option.several:
                values = list(itertools.takewhile(lambda part: not part.startswith("-"), rest))
                del rest[: len(values)]
                if not values and not ctx.resilient_parsing:  # click would take the next option for its value
                    raise click.BadOptionUsage(word, f"Option {word!r} requires an argument.", ctx)
                joined += [",".join(values)] if values else []
        return super().parse_args(ctx, joined)


def is_recipe(word: str) -> bool:
    """Whether a word without an option before it names a recipe."""
    return not word.startswith("-") and word.endswith((".yaml", ".yml"))


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
        "--config", "config_file", type=HomePath(dir_okay=False), cls=GroupedOption,
        help="Recipe in YAML; options on the command line win over it.",
    )(command)  # fmt: skip
    return click.option(
        "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=show_all_help, cls=GroupedOption,
        help="Show every option. A switch --NAME also has --no_NAME.",
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
    default = default_of(item)
    if default is True:
        shown = f"  [default: on; --no_{item.name} is off]"
    elif default is None or default is False:
        shown = ""
    else:
        shown = f"  [default: {str(default).replace(',', ', ')}]"
    kind = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
    names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
    common: dict[str, Any] = {
        "default": None,
        "cls": GroupedOption,
        "group": item.metadata["group"],
        "basic": item.metadata["basic"],
        "help": item.metadata["help"] + shown,
        "shell_complete": None if item.metadata["choices"] else completer(item.name),
    }
    if kind is bool:
        names[0] = f"--{item.name}/--no_{item.name}"
        return click.option(*names, item.name, **common)
    if item.metadata["choices"]:
        return click.option(
            *names, item.name, type=Words(item.metadata["choices"], item.metadata["synonyms"]), **common
        )
    if {int, float} <= set(get_args(hint)):
        kind = float
    common["several"] = hint == list[str]
    return click.option(*names, item.name, type=kind if kind in (int, float) else str, **common)


def default_of(item: dataclasses.Field[Any]) -> Any:
    """A setting's default, lists as they are written on the command line."""
    if item.default_factory is not dataclasses.MISSING:
        return ",".join(item.default_factory())
    return item.default


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user named."""
    return {name: value for name, value in values.items() if value is not None}
