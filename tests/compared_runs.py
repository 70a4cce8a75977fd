"""Runs of the shared model that tests of several files hold against each other or against a reference.

Those of as many processes train in turn, in one start; the fixture `compared` gives one by its name.
"""

from __future__ import annotations

EPOCHS = 4
"""Of the layouts' runs."""

FUSED = "--cross_entropy=fused"
REPLICAS = ("--strategy=ddp", "--hardware=cpu:2")
SPLIT = ("--strategy=model_parallel", "--hardware=cpu:2")
THIRDS = ("--strategy=model_parallel", "--hardware=cpu:3")

_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single process": (1, ("--hardware=cpu:1",)),
    "ddp on 2": (2, REPLICAS),
    "ddp on 3": (3, ("--strategy=ddp", "--hardware=cpu:3")),
    "model_parallel on 2": (1, SPLIT),
    "model_parallel on 3": (1, THIRDS),
    "padded ddp on 2": (2, (*REPLICAS, "--padding_free=off")),
    "padded, three rows": (1, ("--hardware=cpu:1", "--per_device_train_batch_size=3", "--padding_free=off")),
    "ddp on 2, a row": (2, (*REPLICAS, "--per_device_train_batch_size=1")),
    "all rows at once": (1, ("--hardware=cpu:1", "--per_device_train_batch_size=12", "--padding_free=on")),
    "lanes, three rows": (1, (*SPLIT, "--pipeline=on", "--per_device_train_batch_size=3")),
    "fused loss": (1, (FUSED, "--hardware=cpu:1", "--per_device_train_batch_size=12", "--padding_free=on")),
    "fused loss, padded ddp on 2": (2, (FUSED, *REPLICAS, "--padding_free=off")),
    "fused loss, model_parallel on 3": (1, (FUSED, *THIRDS)),
    "fused loss, lanes": (1, (FUSED, *SPLIT, "--pipeline=on")),
}
LAYOUTS = {
    name: (processes, (f"--num_train_epochs={EPOCHS}", *options)) for name, (processes, options) in _LAYOUTS.items()
}
"""A number of processes, and options: each trains as the reference does."""

_ALL_WEIGHTS = (*THIRDS, "--full_finetuning", "--weight_decay=0")
TIED = {
    "tied, plain loss": (1, _ALL_WEIGHTS),
    "tied, fused loss": (1, (*_ALL_WEIGHTS, FUSED)),
    "tied, fused loss, lanes": (1, (*_ALL_WEIGHTS, FUSED, "--pipeline=on")),
}
"""They train all weights of the tied model, split in three."""

RATE = "--learning_rate=0.05"
"""So high that the held-out loss soon rises."""
STOPPING = (
    "--eval_steps=2", "--load_best_model_at_end", "--early_stopping_patience=2", RATE,
    "--lr_scheduler_type=constant", "--warmup_steps=0", "--num_train_epochs=8",
)  # fmt: skip
STOPPING_ALONE = ("--strategy=ddp", "--hardware=cpu:1", "--per_device_train_batch_size=12", *STOPPING)
_LANES = (*SPLIT, "--pipeline=on")
_PATIENCE_OF_ONE = ("--eval_steps=2", "--early_stopping_patience=1", "--num_train_epochs=8")
STOPPED = {
    "stopped, one": (1, (*STOPPING_ALONE, "--save_total_limit=1")),
    "stopped, ddp": (2, (*REPLICAS, "--per_device_train_batch_size=6", *STOPPING, "--save_total_limit=1")),
    "stopped, split": (1, (*_LANES, *STOPPING, "--save_total_limit=1")),
    "stopped, threshold": (
        1,
        (
            "--hardware=cpu:1", *_PATIENCE_OF_ONE, "--early_stopping_threshold=100", "--save_steps=3",
            "--learning_rate=1e-4",
        ),
    ),
    "stopped, all weights": (
        1,
        (*_LANES, "--full_finetuning", *_PATIENCE_OF_ONE, "--load_best_model_at_end", RATE, "--warmup_steps=0"),
    ),
}  # fmt: skip
"""They stop early."""

PACKED = ("--packing", "--global_batch_size=2", "--per_device_train_batch_size=1")
"""Two sequences a step, of which each process or micro-batch takes one."""

_SHORT = ("--strategy=ddp", "--hardware=cpu:1", "--max_steps=3")
_LONG_REPLICAS = (*REPLICAS, "--num_train_epochs=3")
OTHERS = {
    "bare": (2, _LONG_REPLICAS),
    "profiled": (2, (*_LONG_REPLICAS, "--profile_steps=1")),
    "profiled, three steps": (1, (*_SHORT, "--global_batch_size=2", "--profile_steps=9")),
    "no rows kept": (1, (*_SHORT, "--no_data_cache")),
    "packed, lanes": (1, (*_LANES, *PACKED)),
}

RUNS = LAYOUTS | TIED | STOPPED | OTHERS
