"""One trainer for every strategy: TRL's SFTTrainer over our own global batches. It sees a Session, never a strategy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import AutocastKwargs
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from parallel_tune.best import last_weights_stay
from parallel_tune.checkpoint_writer import CheckpointWriter
from parallel_tune.config import TrainConfig
from parallel_tune.data import EncodedRows, collate
from parallel_tune.data.packing import PackedRows
from parallel_tune.evaluation import held_out_loss
from parallel_tune.model_methods import read_adapters_onto, stays_in_training
from parallel_tune.router_loss import RouterLoss
from parallel_tune.row_arguments import model_arguments, with_boundaries_on
from parallel_tune.sampler import GlobalBatches, MicroBatchSampler
from parallel_tune.trackers import chosen, keep_from_ending_the_run
from parallel_tune.trainer_parts import Arguments, EpochDataLoader, InBfloat16
from strategies.base import Schedule, Session
from strategies.clipping import clip_over_devices
from strategies.contracts import Plan
from strategies.errors import RunFailed
from strategies.randomness import begin_at


class GlobalBatchTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose steps are global batches, and whose loss is the mean over all their predicted tokens."""

    def __init__(
        self,
        *,
        batches: GlobalBatches,
        session: Session,
        plan: Plan,
        checkpoints: CheckpointWriter,
        pad: Callable[[list[Any]], dict[str, Any]],
        tokens_at_once: int,
        **kwargs: Any,
    ) -> None:
        """As SFTTrainer's; `pad` makes the held-out rows' batches, of no more than `tokens_at_once`."""
        self.batches = batches
        self.session = session
        self.plan = plan
        self._pad = pad
        self._tokens_at_once = tokens_at_once
        self.checkpoints = checkpoints
        self._save_error: Exception | None = None
        self._evaluated: tuple[int, float] | None = None
        self._has_best = False
        self._waiting: list[Any] = []
        self._ahead: tuple[Iterator[Any], list[Any]] | None = None
        self._epoch_iterator: Iterator[Any] | None = None
        self._router_loss = RouterLoss(kwargs["model"])
        super().__init__(**kwargs)
        self._router_loss.keep_choice()
        # TRL casts the adapters of a 4-bit model to bfloat16; they train in float32 here, whatever holds the base.
        if hasattr(self.model, "peft_config"):
            read_adapters_onto(self.model, session.device)
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        schedule = session.schedule
        if schedule is not None and schedule.sums_gradients:
            # DDP's reducer would sum them once more, and its hooks cannot be captured.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # The same walk again, at the end of each step.
        self.model.zero_grad = self._forget_gradients
        self._num_parameters: int = self.model.num_parameters(exclude_embeddings=True)
        if schedule is not None:
            # Autocast's cache of cast weights is the whole process's: it would hand one thread's tensor to another.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.accelerator.ddp_handler is not None:
            # Gradients live in the buckets: no second copy of them, as long as no step lets go of them.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
            if plan.reduce_dtype == "bfloat16":
                self.accelerator.ddp_handler = InBfloat16(**vars(self.accelerator.ddp_handler))

    def floating_point_ops(self, inputs: Any) -> int:
        """6 FLOP a parameter and token, as transformers counts; which counts all parameters in each micro-batch."""
        tokens: int = inputs["input_ids"].numel()
        return 6 * tokens * self._num_parameters

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        if set_to_none:
            for parameter in self._trained:
                parameter.grad = None
        elif gradients := [each.grad for each in self._trained if each.grad is not None]:
            torch._foreach_zero_(gradients)

    def _clip_grad_norm(self, model: Any) -> Any:
        # Of those that train: transformers walks through all modules to find every parameter.
        if len({parameter.device for parameter in self._trained}) == 1:
            return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)
        self.accelerator.unscale_gradients()
        return clip_over_devices(self._trained, self.args.max_grad_norm)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's share; accelerate's own sharding would feed rows of a short last batch twice."""
        sampler = MicroBatchSampler(
            self.batches,
            self.session.rank,
            self.plan.processes,
            self.plan.micro_batch,
            self.plan.gradient_accumulation_steps,
            is_split=self.plan.processes == 1 and len(self.plan.devices) > 1,
        )
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.session.device.type == "cuda",
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one step, and the predicted tokens of the global batch.

        The count follows from the step alone: no rank has to ask the others, nor to wait for its GPU. A run that was
        resumed after its last step, or its stop, has none left, where transformers would train one more.
        """
        ahead, self._ahead, self._epoch_iterator = self._ahead, None, epoch_iterator
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            return [], torch.zeros((), device=device)
        if ahead is not None and ahead[0] is epoch_iterator:
            micro_batches = ahead[1]
        else:
            micro_batches = list(itertools.islice(epoch_iterator, num_batches))
        return micro_batches, torch.tensor(self.batches.target_tokens(self.state.global_step), device=device)

    def _fetch_ahead(self) -> None:
        """Make the next step's micro-batches while the device still works on this one's."""
        if self._epoch_iterator is not None and self.state.global_step + 1 < self.state.max_steps:
            # All steps have the same number of micro-batches; at an epoch's end there are none left.
            number = self.plan.gradient_accumulation_steps
            self._ahead = (self._epoch_iterator, list(itertools.islice(self._epoch_iterator, number)))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss, normalised over the global batch.

        TRL's needs a Triton kernel, so a GPU, and gathers metrics over all ranks in each micro-batch.
        """
        inputs, keep_to_rows = model_arguments(inputs, self.plan.engine)
        with keep_to_rows:
            if not self._router_loss.asked:
                return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"]  # the pass may take them out
            loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        loss = self._router_loss.by_share(loss, outputs, labels, num_items_in_batch, self.plan.processes)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; where the session has a schedule, the step's last call runs them all through it.

        transformers adds up what this returns, gradients are clipped and applied after the last call: both see just
        what they would see if the micro-batches had been taken in turn.
        """
        schedule = self.session.schedule
        if schedule is None:
            if isinstance(model, DistributedDataParallel):
                # Gradients that are let go of are made anew by the next step's first micro-batch, beside the buckets.
                model.zero_grad = partial(self._forget_gradients, set_to_none=False)  # type: ignore[method-assign]
            # The loss of a split model lies where its head is.
            with stays_in_training(model):
                loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self._fetch_ahead()
            return loss.to(self.args.device)
        self._waiting.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        waiting, self._waiting = self._waiting, []
        *earlier, last = self._run_step(schedule, model, waiting, num_items_in_batch)
        self._fetch_ahead()
        for loss in earlier:
            self._tr_loss += loss  # one by one, as they are summed without a schedule
        return last

    def _run_step(self, schedule: Schedule, model: Any, waiting: list[Any], num_items: Any) -> list[torch.Tensor]:
        """The losses of a step's micro-batches, after forward and backward of all."""
        if not model.training:
            model.train()
        micro_batches = []
        for inputs in waiting:
            labels = inputs["labels"].to(schedule.labels_device)
            rest = self._prepare_inputs({name: value for name, value in inputs.items() if name != "labels"})
            rest = with_boundaries_on(rest, schedule.devices)
            micro_batches.append({**rest, "labels": labels, "num_items_in_batch": num_items.to(schedule.labels_device)})

        def forward(_: int, inputs: dict[str, Any]) -> torch.Tensor:
            inputs = dict(inputs)
            num_items = inputs.pop("num_items_in_batch")
            with self.compute_loss_context_manager():
                loss: torch.Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items)
            return loss

        # Seed and step together tell the dropout of this step from that of any other.
        key = (self.args.seed << 32) + self.state.global_step
        # Checkpoints hold the first GPU's generator alone, and a resumed run draws what it would have drawn.
        begin_at(key, schedule.devices[1:])
        losses = schedule.run(micro_batches, forward, backward=self.accelerator.backward, key=key)
        return [loss.to(self.args.device) for loss in losses]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per predicted token of the held-out rows, over all ranks; computed once a step."""
        if eval_dataset is None and self._evaluated is not None and self._evaluated[0] == self.state.global_step:
            return {f"{metric_key_prefix}_loss": self._evaluated[1]}
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        most_rows = self.args.per_device_eval_batch_size
        # Which the model enters by itself only once it has been prepared for training.
        with self.accelerator.autocast(), self._router_loss.left_out():
            loss = held_out_loss(self.model, rows, self._pad, most_rows, self._tokens_at_once, self.session)
        self._evaluated = (self.state.global_step, loss)
        metrics = {f"{metric_key_prefix}_loss": loss}
        if self._has_best:
            return metrics  # the weights of an earlier step: no row of this one
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        """The weights of the best evaluation; what was evaluated last is no longer the model."""
        if last_weights_stay(self.state, self._evaluated, self.session):
            return
        super()._load_best_model()
        self._evaluated = None
        self._has_best = True

    def require_finite_weights(self) -> None:
        """A step whose gradients were not finite shows in the next step's loss, after its weights would be kept.

        Raises:
            RunFailed: a trained weight is not finite.
        """
        if all(bool(torch.isfinite(parameter).all()) for parameter in self._trained):
            return
        raise RunFailed(
            f"trained weights are not finite after step {self.state.global_step}, and are not saved",
            "Lower --learning_rate, or use --dtype bfloat16 or float32; a checkpoint before it can be resumed.",
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.checkpoints.remember_best(self.state)
        # Where the best are saved this alone decides whether a checkpoint is; one that a stop has asked for is due too.
        return bool(super()._determine_best_metric(metrics, trial)) or self.control.should_save

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite_weights()
        best_stays = self.args.load_best_model_at_end
        self.checkpoints.save(
            self.state, Path(self.args.output_dir), partial(self._write_parts, model, trial), self._trained, best_stays
        )

    def _write_parts(self, model: Any, trial: Any, folder: Path) -> None:
        """What this rank writes of a checkpoint, into a folder of checkpoints."""
        run, self.args.output_dir, self._save_error = self.args.output_dir, str(folder), None
        try:
            # Past TRL's, which would write a model card of its own.
            Trainer._save_checkpoint(self, model, trial)
        finally:
            self.args.output_dir = run
        if self._save_error is not None:
            raise self._save_error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights; an error waits until the other ranks, which meet this one in a barrier, have met it."""
        try:
            super().save_model(output_dir, _internal_call)
        except (OSError, RuntimeError, SafetensorError) as error:
            self._save_error = error


def build_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: EncodedRows | PackedRows,
    held_out_rows: EncodedRows | None,
    batches: GlobalBatches,
    config: TrainConfig,
    plan: Plan,
    session: Session,
    dtype: torch.dtype,
    run_path: Path,
    engine_arguments: dict[str, Any],
    callbacks: list[TrainerCallback],
    gather: Callable[[list[Any]], dict[str, Any]] | None,
    tokens_at_once: int,
    checkpoints: CheckpointWriter,
) -> GlobalBatchTrainer:
    """The trainer of this rank, ready for `train()`.

    Args:
        gather: makes micro-batches of rows, which are padded without.
        tokens_at_once: of the largest micro-batch, padding included; evaluation takes no more.
    """

    def pad(rows: list[Any]) -> dict[str, Any]:
        return collate(rows, tokenizer.pad_token_id)

    arguments = Arguments(
        output_dir=str(run_path),
        run_name=config.run_name,
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        lr_scheduler_kwargs=config.lr_scheduler_kwargs,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        # It hides a loss that is not finite, and waits for the GPU in every micro-batch.
        logging_nan_inf_filter=False,
        save_strategy=config.saves,
        save_steps=config.save_steps or 500,
        eval_strategy=config.evaluates,
        eval_steps=config.eval_steps or None,
        load_best_model_at_end=config.load_best_model_at_end,
        metric_for_best_model=config.metric_for_best_model,
        greater_is_better=False,
        report_to=chosen(config.report_to) or "none",
        ddp_timeout=config.ddp_timeout,
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        max_length=None,
        packing=False,
        padding_free=False,  # Our own, which Unsloth must not replace
        dataset_kwargs={"skip_prepare_dataset": True},
        **session.training_arguments(),
        **engine_arguments,
    )
    trainer = GlobalBatchTrainer(
        batches=batches,
        session=session,
        plan=plan,
        checkpoints=checkpoints,
        model=model,
        args=arguments,
        train_dataset=train_rows.to_dataset(),
        eval_dataset=held_out_rows.to_dataset() if held_out_rows is not None else None,
        processing_class=tokenizer,
        data_collator=gather or pad,
        pad=pad,
        tokens_at_once=tokens_at_once,
        callbacks=callbacks,
    )
    keep_from_ending_the_run(trainer.callback_handler.callbacks)
    return trainer
