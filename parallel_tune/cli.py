"""The command line. Nothing here imports torch or transformers: help and plans answer at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem, get_completion_class

from parallel_tune import __version__
from parallel_tune.options import (
    TOKENS,
    GroupedHelp,
    GroupedOption,
    HomePath,
    SettingsCommand,
    given,
    is_recipe,
    some_train_options,
    train_options,
    write_groups,
)
from strategies.errors import ConfigError, ParallelTuneError

DEFAULT_COMMAND = "train"


class Program(click.Group):
    """A group whose options without a verb mean `train`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        verb_less = not args or (args[0].startswith("-") and args[0] not in own) or is_recipe(args[0])
        if ctx.resilient_parsing and not args:
            verb_less = False  # a shell completes the first word, which may become a verb
        return super().parse_args(ctx, [DEFAULT_COMMAND, *args] if verb_less else args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs, and the options of `train`, whose verb may be left out."""
        train = self.commands[DEFAULT_COMMAND]
        own = super().shell_complete(ctx, incomplete)
        return own + (train.shell_complete(click.Context(train), incomplete) if incomplete.startswith("-") else [])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        train = self.commands[DEFAULT_COMMAND]
        version = [parameter for parameter in self.params if parameter.name == "version"]
        of_train = click.Context(train, info_name=ctx.info_name)
        write_groups(of_train, [*train.get_params(of_train), *version], formatter)
        self.format_commands(ctx, formatter)


debug_option = click.option(
    "--debug", is_flag=True, default=False, cls=GroupedOption, help="Show the traceback of an error."
)


@click.group(cls=Program, context_settings=TOKENS)
@click.version_option(__version__, prog_name="parallel-tune")
def program() -> None:
    """Fine-tune a language model with Unsloth on all the GPUs of this machine.

    \b
    parallel-tune --strategy ddp              a replica on each GPU
    parallel-tune --strategy model_parallel   one model split over the GPUs
    parallel-tune --strategy auto             decided from model size and memory
    parallel-tune plan                        the decision and its numbers only
    """


@program.command(cls=SettingsCommand, context_settings=TOKENS)
@train_options
@click.option(
    "--print_config", is_flag=True, default=False, cls=GroupedOption, help="Print the settings as a recipe and leave."
)
@debug_option
def train(config_file: str | None, print_config: bool, debug: bool, **options: Any) -> None:
    """Train; the verb may be left out."""
    from parallel_tune import commands

    config = commands.read_config(config_file, given(options))
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    commands.train(config)


@program.command(
    short_help="Show what a run would do, and start nothing.", cls=SettingsCommand, context_settings=TOKENS
)
@train_options
@click.option("--json", "as_json", is_flag=True, default=False, cls=GroupedOption, help="Print one JSON object.")
@click.option(
    "--measure", is_flag=True, default=False, cls=GroupedOption,
    help="First measure what CUDA, NCCL and the libraries take on this machine's GPUs, and keep it.",
)  # fmt: skip
@debug_option
def plan(config_file: str | None, as_json: bool, measure: bool, debug: bool, **options: Any) -> None:
    """Show what a run would do, with its numbers, and start nothing."""
    from parallel_tune import commands

    commands.plan(commands.read_config(config_file, given(options)), as_json, measure)


@program.command(short_help="Compare the strategies on this machine.", cls=SettingsCommand, context_settings=TOKENS)
@train_options
@click.option("--steps", default=20, show_default=True, cls=GroupedOption, help="Optimizer steps of each run.")
@click.option(
    "--skip_steps", default=None, type=int, cls=GroupedOption,
    help="Steps at the beginning of each run that do not count.  [default: a quarter, at least 2]",
)  # fmt: skip
@click.option("--repeat", default=3, show_default=True, cls=GroupedOption, help="Runs of each, all in turn.")
@click.option(
    "--strategies", default=None, cls=GroupedOption, several=True,
    help="What to compare: single, ddp, naive, lanes (model_parallel is both), or installed ones.  [default: all]",
)  # fmt: skip
@click.option(
    "--reference", default=None, cls=GroupedOption,
    help="A command to run beside ours on the same rows; {model} {rows} {steps} {global_batch} {max_seq_length} "
    "{result} are filled in, and JSON that it writes to {result} is read: seconds and tokens, a number a step.",
)  # fmt: skip
@debug_option
def bench(
    config_file: str | None,
    steps: int,
    skip_steps: int | None,
    repeat: int,
    strategies: str | None,
    reference: str | None,
    debug: bool,
    **options: Any,
) -> None:
    """Compare the strategies on this machine: the same rows and global batch, each in short real runs."""
    from parallel_tune import commands
    from parallel_tune.bench.command import Request, bench

    request = Request(steps, skip_steps, repeat, strategies, reference)
    bench(commands.read_config(config_file, given(options)), request)


@program.command(
    short_help="Run a training SCRIPT of yours under a strategy.",
    cls=GroupedHelp,
    context_settings={**TOKENS, "allow_interspersed_args": False},
)
@some_train_options(
    "strategy", "hardware", "max_seq_length", "load_in_4bit", "full_finetuning", "engine",
    "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "output_dir", "trace",
)  # fmt: skip
@click.option(
    "--model", "--model_name", default=None, cls=GroupedOption, group="Model",
    help="The model that SCRIPT trains, whose size decides; read from the script if left out.",
)  # fmt: skip
@debug_option
@click.argument("script", type=HomePath(dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(script: str, arguments: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Run an Unsloth, TRL or transformers SCRIPT with its ARGUMENTS under a strategy.

    ddp starts it on every device; model_parallel runs it in one process that sees all devices. The model's size
    decides under auto: give --model where the script does not write it out. The other options size the plan that
    `parallel_tune.placement()` tells the script; they change nothing in the script by themselves.
    """
    from parallel_tune.script_launch import launch_script

    launch_script(Path(script), arguments, given(options))


@program.command(context_settings=TOKENS)
@click.argument("run", type=HomePath(file_okay=False))
@click.option("--hub_token", default=None, help="Token for a push when it is done; else HF_TOKEN or the stored login.")
@click.option(
    "--replan", is_flag=True, default=False,
    help="Plan the rest for the devices that are here now, be they fewer, more or others. Each step trains the rows "
    "that it would have trained.",
)  # fmt: skip
@click.option("--strategy", default=None, help="Plan the rest anew by this strategy: ddp, model_parallel or auto.")
@click.option("--max_devices", default=None, type=click.IntRange(min=1), help="Plan it for no more devices than this.")
@click.option("--hardware", default=None, help="Plan it for declared devices, e.g. cpu:2.")
@debug_option
def resume(
    run: str,
    hub_token: str | None,
    replan: bool,
    strategy: str | None,
    max_devices: int | None,
    hardware: str | None,
    debug: bool,
) -> None:
    """Go on with a run from its last complete checkpoint."""
    from parallel_tune import commands
    from parallel_tune.replan import Changes

    changes = Changes(strategy, hardware, max_devices)
    commands.resume(Path(run), hub_token, changes if replan or changes != Changes() else None)


@program.command(short_help="Write an adapter, a merged model or a GGUF file.", context_settings=TOKENS)
@click.argument("run", type=HomePath(file_okay=False))
@click.option(
    "--save_method",
    default="lora",
    show_default=True,
    type=click.Choice(["lora", "merged_16bit", "merged_4bit", "gguf"]),
)
@click.option("--save_path", required=True, type=HomePath(), help="The folder to write; new or empty.")
@click.option(
    "--quantization", default=None,
    help="Types of the GGUF files, comma-separated: f16, bf16, q8_0, q4_k_m and so on; f16 if left out.",
)  # fmt: skip
@click.option(
    "--push_model", "--hub_path", "push_model", default=None,
    help="Hub repository to push to, e.g. me/my-model; made private if new.",
)  # fmt: skip
@click.option("--hub_token", default=None, help="Token for the push; else HF_TOKEN or the stored login.")
@debug_option
def export(
    run: str,
    save_method: str,
    save_path: str,
    quantization: str | None,
    push_model: str | None,
    hub_token: str | None,
    debug: bool,
) -> None:
    """Write what a RUN trained as an adapter, a merged model or a GGUF file, with a model card."""
    from parallel_tune.export import Export, export_run

    if quantization is not None and save_method != "gguf":
        raise ConfigError(
            f"--quantization {quantization} is about GGUF files, and --save_method {save_method} writes none",
            "Add --save_method gguf, or drop --quantization.",
        )
    types = tuple(part.strip() for part in (quantization or "f16").split(",") if part.strip())
    export_run(Path(run), Export(save_method, save_path, types, push_model), hub_token)


@program.command(context_settings=TOKENS)
@click.argument("run", type=HomePath(file_okay=False))
@debug_option
def report(run: str, debug: bool) -> None:
    """Write RUN/report.html anew."""
    from parallel_tune.reporting.run_page import write_page

    click.echo(str(write_page(Path(run))))


@program.command(short_help="Show runs side by side: table, HTML and PNG.", context_settings=TOKENS)
@click.argument("runs", nargs=-1, required=True, type=HomePath(file_okay=False))
@click.option("--output", default="outputs/compare", show_default=True, type=HomePath(file_okay=False), help="Folder.")
@debug_option
def compare(runs: tuple[str, ...], output: str, debug: bool) -> None:
    """Show runs side by side: a table, compare.html and compare.png."""
    from parallel_tune.reporting.compare import compare as compare_runs

    compare_runs([Path(run) for run in runs], Path(output))


@program.command(short_help="Say what is here, and whether a run could start.", context_settings=TOKENS)
@click.option("--json", "as_json", is_flag=True, default=False, help="Print one JSON object.")
@click.option("--output_dir", default="outputs", show_default=True, type=HomePath(), help="Where runs shall lie.")
@debug_option
def doctor(as_json: bool, output_dir: str, debug: bool) -> None:
    """Say what is here, and whether a run could start; exit code 2 if none could."""
    import os

    from parallel_tune import doctor as doctors

    checks = doctors.examine(os.environ, Path(output_dir))
    click.echo(doctors.to_json(checks) if as_json else doctors.render(checks))
    if not doctors.is_ready(checks):
        sys.exit(2)


@program.command(short_help="Fine-tune a small real model on example data.", context_settings=TOKENS)
@click.option("--strategy", default="auto", show_default=True, help="ddp, model_parallel or auto.")
@click.option("--hardware", default=None, help="Devices, for example cpu:2.")
@click.option("--model_dir", default=None, type=HomePath(), help="Where the demo's model is kept.")
@click.option("--max_steps", default=None, type=int, help="Optimizer steps.")
@debug_option
def demo(strategy: str, hardware: str | None, model_dir: str | None, max_steps: int | None, debug: bool) -> None:
    """Fine-tune a small real model on the example dataset and show what changed."""
    from parallel_tune.demo import run_demo

    run_demo(strategy, hardware, Path(model_dir) if model_dir else None, max_steps)


@program.command(short_help="Print what makes a shell complete options.", context_settings=TOKENS)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete options: `eval "$(parallel-tune completion bash)"`."""
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(program, {}, "parallel-tune", "_PARALLEL_TUNE_COMPLETE").source())


def main(arguments: list[str] | None = None) -> None:
    """Run the program and end the process with its exit code; with 1 where it went well and could not be printed."""
    code: Any = None
    try:
        run(arguments)
    except SystemExit as end:
        code = end.code
    except OSError:
        unwritten = _print_left("\n")
        if unwritten is None:
            raise  # another file's
        _say_unwritten(unwritten)
    unwritten = _print_left()
    if unwritten is not None and not code:
        _say_unwritten(unwritten)
    if code is not None:
        sys.exit(code)


def _print_left(more: str = "") -> OSError | None:
    """Print what is still in the buffer, and more; returns why that cannot be."""
    if sys.stdout is None:  # closed by the caller
        return None
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except OSError as error:
        # It would fail once more at the interpreter's end, which would take the exit code for its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _say_unwritten(error: OSError) -> NoReturn:
    if not isinstance(error, BrokenPipeError):  # a reader that left knows
        with _complaining():
            click.echo(f"parallel-tune: cannot write to standard output: {error.strerror}", err=True)
    sys.exit(1)


@contextlib.contextmanager
def _complaining() -> Iterator[None]:
    """Where stderr takes nothing any more, as of a terminal that is gone, the exit code says alone what is wrong."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def run(arguments: list[str] | None) -> None:
    """Run the program; what went wrong is said on stderr and becomes the exit code."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        program.main(args=arguments, prog_name="parallel-tune", standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        with _complaining():
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        with _complaining():
            click.echo("parallel-tune: stopped before anything was started.", err=True)
        sys.exit(130)
    except ParallelTuneError as error:
        with _complaining():
            if debug:
                import traceback

                click.echo(error.trace or traceback.format_exc(), err=True)
            click.echo(f"parallel-tune: {error.message}", err=True)
            if error.hint:
                click.echo(error.hint, err=True)
        sys.exit(error.exit_code)
