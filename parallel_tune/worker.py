"""The one entry of a training process: obey the plan, train, save, report, and leave with a code that says it.

python -m parallel_tune.worker RUN_DIRECTORY [CHECKPOINT]
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from parallel_tune.device_use import CardUse, look_before
from parallel_tune.process import WATCHER, die_with_parent, importing, leave, redirect_output, take_sigterm
from parallel_tune.rescue import NotWritten, agreed, write_somewhere
from parallel_tune.rundir import Outcome, RunDir, write_atomically, write_outcome
from parallel_tune.startup import Startup
from strategies.errors import ParallelTuneError, RunFailed, Stopped

if TYPE_CHECKING:
    from strategies.base import Session


def main(arguments: list[str]) -> NoReturn:
    """Train as the run directory says. Never returns."""
    watcher = os.environ.get(WATCHER, "")
    die_with_parent(int(watcher) if watcher else None)
    run = RunDir(Path(arguments[0]))
    checkpoint = Path(arguments[1]) if len(arguments) > 1 else None
    rank = int(os.environ.get("RANK", "0"))
    redirect_output(run.log(rank))
    end_at_signal(run, rank)
    write_atomically(run.process_id(rank), str(os.getpid()))
    run_to_its_end(run, rank, checkpoint)


def end_at_signal(run: RunDir, rank: int) -> None:
    """End this process at SIGTERM, until the trainer takes the signal over.

    An exception would be swallowed where a library tries an import and goes on without it.
    """

    def end(number: int, _frame: Any) -> NoReturn:
        error = RunFailed(f"ended by {signal.Signals(number).name} before training began")
        # A rank that goes without a word would be taken for the one that failed first.
        with contextlib.suppress(OSError):
            write_outcome(run, rank, Outcome(error.exit_code, error.message))
        leave(error.exit_code)

    signal.signal(signal.SIGTERM, end)
    take_sigterm()


def run_to_its_end(
    run: RunDir,
    rank: int,
    checkpoint: Path | None,
    at_end: Callable[[Outcome], None] = lambda _: None,
    use: CardUse | None = None,
) -> NoReturn:
    """Train, write this rank's outcome and end the process with its code.

    What training held stays referenced until the process is gone: freeing a process group's last references can wait
    for ever for another rank's threads, and can abort after all work is done.
    """
    held: list[Any] = []
    try:
        held.append(train(run, checkpoint, use))
        outcome = Outcome(0)
    except ParallelTuneError as error:
        held.append(error)
        is_final = isinstance(error, NotWritten)
        outcome = Outcome(error.exit_code, error.message, error.hint, traceback.format_exc(), is_final)
    except BaseException as error:
        held.append(error)
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        outcome = Outcome(1, message, _hint(error), traceback.format_exc())
    try:
        write_outcome(run, rank, outcome)
    except OSError:
        traceback.print_exc()
        leave(outcome.code or 1)
    try:
        at_end(outcome)
    except Exception:
        # What there is to say goes astray; how it ended stands.
        traceback.print_exc()
    leave(outcome.code)


def _hint(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "The device's memory did not suffice, so the prediction was wrong: use a smaller "
            "--per_device_train_batch_size or --max_seq_length, or --use_gradient_checkpointing full."
        )
    return "The log of the rank has the whole story; --debug shows the traceback here."


def train(run: RunDir, checkpoint: Path | None, use: CardUse | None = None) -> Any:
    """One rank's whole training. Returns what must not be freed while the process lives.

    Args:
        use: the cards as they were before this process touched one; None if it has not yet.

    Raises:
        Stopped: a signal ended it; a checkpoint is on disk.
        ParallelTuneError: it could not be done, and why.
    """
    started = time.monotonic()
    startup = Startup(os.environ)
    config, plan = run.read()
    # TensorBoard's own default is a folder in the working directory.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    from parallel_tune.engines import open_engine
    from parallel_tune.unneeded import leave_out, unneeded_packages
    from strategies.registry import load_registry

    if use is None:
        use = look_before(os.environ) if plan.devices[0].kind == "cuda" else CardUse()
    strategy = load_registry().get(plan.strategy)
    if type(strategy).__module__.startswith("strategies."):  # another's may import what it likes
        leave_out(unneeded_packages(config, plan.engine))
    with importing():
        # The session chooses the process's device: Unsloth's import uses the current one, which is card 0 until then.
        session = strategy.open(plan, config.ddp_timeout)
        engine = open_engine(plan.engine)
        engine.prepare()  # before transformers, trl and peft are imported

        import torch

        from parallel_tune import report
        from parallel_tune.best import FindBest
        from parallel_tune.callbacks import FirstStep, MetricsWriter, StopAtSignal
        from parallel_tune.checkpoint import require_room, weight_bytes
        from parallel_tune.checkpoint_writer import CheckpointWriter
        from parallel_tune.data.prepare import prepare_data, require_same_rows
        from parallel_tune.data_part import describe_data
        from parallel_tune.fused_head import use_chunked_loss
        from parallel_tune.gathering import choose_gathering
        from parallel_tune.log_edges import LogAtEdges
        from parallel_tune.prediction import trained_rows
        from parallel_tune.sampler import GlobalBatches
        from parallel_tune.stopping import StopEarly, check_reached
        from parallel_tune.tracing import predict_for_rows
        from parallel_tune.training import build_trainer

    stop = StopAtSignal(session)
    stop.listen()
    startup.mark("import")
    dtype: torch.dtype = getattr(torch, plan.dtype)
    model, tokenizer = engine.load(config, plan, session, dtype)
    startup.mark("load")
    train_rows, held_out_rows, data_report = prepare_data(config, tokenizer)
    require_same_rows(config, train_rows, held_out_rows, session)
    startup.mark("data")
    batches = GlobalBatches(
        lengths=tuple(train_rows.lengths),
        targets=tuple(train_rows.answer_tokens),
        global_batch=plan.global_batch,
        seed=config.seed,
    )
    check_reached(config, batches.steps_per_epoch)
    model = engine.add_adapters(model, config, plan)
    require_room(run.path, weight_bytes(model.parameters()))
    session.place(model)
    startup.mark("load")
    fused = config.cross_entropy == "fused" and plan.engine == "transformers"
    if fused:
        use_chunked_loss(model, train_rows, session, dtype)
    gathering = choose_gathering(model, tokenizer, train_rows, batches, config, plan, session, dtype)
    batches = gathering.batches
    first_epoch = trained_rows(batches, plan, batches.steps_per_epoch, gathering.padded_reason, gathering.sizes)
    if session.is_main:
        predicted = predict_for_rows(config, plan, first_epoch)
        data_part = describe_data(
            data_report,
            batches,
            train_rows.row_lengths,
            plan,
            config.max_seq_length,
            gathering.padded_reason,
            predicted,
        )
        if checkpoint is not None:
            data_part = data_part.after(run.data)
        data_part.save(run.data)
        loss_said = ["the loss is computed chunk by chunk"] if fused else []
        print(*data_part.lines(), *gathering.said(), *loss_said, sep="\n")
    metrics = MetricsWriter(run, batches, session)
    patience = config.early_stopping_patience
    early = [StopEarly(patience, config.early_stopping_threshold, session)] if patience is not None else []
    best = [FindBest(run.path)] if config.load_best_model_at_end else []
    profiled = []
    if config.profile_steps:
        from parallel_tune.profiling import ProfileSteps

        profiled.append(ProfileSteps(run.profile, config.profile_steps, session))
    checkpoints = CheckpointWriter(session, config.save_total_limit, lambda: stop.stopped)
    trainer = build_trainer(
        model, tokenizer, train_rows, held_out_rows, batches, config, plan, session, dtype, run.path,
        engine.training_arguments(plan), [*profiled, FirstStep(startup), metrics, stop, *early, *best, LogAtEdges()],
        gathering.gather, first_epoch.tokens_at_once(plan.micro_batch), checkpoints,
    )  # fmt: skip
    startup.mark("prepare")
    results: dict[str, Any] = {}
    if held_out_rows is not None:
        results["held_out_loss_before"] = trainer.evaluate()["eval_loss"]
        startup.mark("evaluate")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        raise stopped(run, trainer.state.global_step, trainer.state.max_steps, checkpoints.elsewhere)
    if held_out_rows is not None:
        results["held_out_loss_after"] = trainer.evaluate()["eval_loss"]
    if early and early[0].stopped_at_step is not None:
        results["stopped_early_at_step"] = early[0].stopped_at_step
    if config.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        results["best_step"] = trainer.state.best_global_step
    if checkpoints.missed:
        results["missed_checkpoints"] = checkpoints.missed
    trainer.require_finite_weights()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    error = keep_result(trained, tokenizer, run.result(config), session)
    if error is not None:
        # One rank says it, when all have done their part.
        if session.is_main:
            raise error
        return trainer, session
    steps = trainer.state.global_step
    rows = trained_rows(batches, plan, steps, gathering.padded_reason, gathering.sizes)
    try:
        report.write(
            run, config, plan, session, metrics, steps, results, data_report, rows, time.monotonic() - started,
            startup.report(), use,
        )  # fmt: skip
    except OSError as failed:
        raise NotWritten(
            f"{run.result(config)} is complete, but the run's report could not be written: {failed}",
            "The run can be exported as any other.",
        ) from failed
    session.barrier()
    session.close()
    return trainer, session


def stopped(run: RunDir, step: int, steps: int, elsewhere: tuple[Path, RunFailed] | None) -> ParallelTuneError:
    """What a run says that a signal ended after a step, its checkpoint written."""
    after = f"stopped by a signal after step {step} of {steps}"
    if elsewhere is None:
        return Stopped(
            f"{after}; checkpoint-{step} is on disk",
            f"Go on with `parallel-tune resume {shlex.quote(str(run.path))}`.",
        )
    checkpoint, error = elsewhere
    return NotWritten(
        f"{after}; {error.message}, so {checkpoint.name} lies in {checkpoint.parent}",
        f"Make room, then `mv {shlex.quote(str(checkpoint))} {shlex.quote(str(run.path))}` and "
        f"`parallel-tune resume {shlex.quote(str(run.path))}`.",
    )


def keep_result(model: Any, tokenizer: Any, result: Path, session: Session) -> NotWritten | None:
    """Write the trained weights, elsewhere if the run's disk does not take them. Every rank calls it.

    Returns:
        What to say where they lie elsewhere.

    Raises:
        NotWritten: they could not be written anywhere.
    """
    from parallel_tune.checkpoint import weight_bytes

    def write(folder: Path) -> RunFailed | None:
        error: RunFailed | None = None
        if session.is_main:
            try:
                save_result(model, tokenizer, folder / result.name)
            except RunFailed as failed:
                error = failed
        return agreed(error, session)

    folder, error = write_somewhere(write, result.parent, weight_bytes(model.parameters()), session)
    if error is None:
        return None
    kept = folder / result.name
    return NotWritten(
        f"training is done, but {error.message}; the result lies in {kept}",
        f"Make room, then `mv {shlex.quote(str(kept))} {shlex.quote(str(result.parent))}`: "
        "the run can be exported then as any other; only its report is missing.",
    )


def save_result(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the trained weights; the folder appears only when complete."""
    from parallel_tune.checkpoint import flush_to_disk, whole_or_none

    if folder.exists():
        raise RunFailed(f"{folder} exists already", "Move it away.")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an earlier process
    with whole_or_none(part):
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        flush_to_disk(part)
        part.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
