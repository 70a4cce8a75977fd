"""The Unsloth engine: FastLanguageModel with Unsloth's own adapters and checkpointing."""

from __future__ import annotations

import os
import sys
from typing import Any

from parallel_tune.cache import cache_folder
from parallel_tune.config import TrainConfig
from parallel_tune.engines import target_modules
from strategies.base import Session
from strategies.contracts import Plan


class UnslothEngine:
    """Loads with Unsloth. It must be imported before trl, transformers and peft."""

    def prepare(self) -> None:
        # Ranks that compile into one folder race; Unsloth's default lies in the working directory.
        rank = os.environ.get("RANK", "0")
        cache = cache_folder() / "unsloth" / f"rank-{rank}"
        cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache))
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        import unsloth  # noqa: F401

    def load(self, config: TrainConfig, plan: Plan, session: Session, dtype: Any) -> tuple[Any, Any]:
        from unsloth import FastLanguageModel

        if config.cross_entropy == "plain":
            # Its forward asks for it in each pass, and else computes its loss piece by piece.
            os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
        if plan.captured:
            # Its compiled blocks save host time that a captured step does not spend, and take minutes to compile.
            os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=config.model,
            max_seq_length=config.max_seq_length,
            dtype=dtype,
            load_in_4bit=config.load_in_4bit,
            full_finetuning=config.full_finetuning,
            device_map=session.device_map(),
            use_gradient_checkpointing=checkpointing(plan),
            # Otherwise a 4-bit model is silently exchanged for a repository of Unsloth's.
            use_exact_model_name=True,
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if plan.padding_free and session.device.type == "cuda":
            _use_row_kernels()
        if len(set(session.device_map().values())) > 1:
            _wait_for_no_device()
        return model, tokenizer

    def add_adapters(self, model: Any, config: TrainConfig, plan: Plan) -> Any:
        if config.full_finetuning:
            return model
        from unsloth import FastLanguageModel

        from parallel_tune.engines.loftq import begin_with_loftq

        adapted = FastLanguageModel.get_peft_model(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias=config.bias,
            target_modules=target_modules(config),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            use_gradient_checkpointing=checkpointing(plan),
            random_state=config.random_state,
            max_seq_length=config.max_seq_length,
        )
        if config.loftq_config is not None:
            begin_with_loftq(adapted, config.model, config.r)
        return adapted

    def training_arguments(self, plan: Plan) -> dict[str, Any]:
        # Unsloth's checkpointing is set on the model; the trainer must not switch on another.
        return {"gradient_checkpointing": plan.gradient_checkpointing != "none"}


def _use_row_kernels() -> None:
    """Let models that Unsloth leaves to transformers attend to joined rows by its kernels, not by a mask of all tokens.

    Its own trainer does so when it pads nothing; ours makes the batches itself. Releases without it use the mask.
    """
    try:
        from unsloth.utils.hf_packed_attention import enable_hf_packed_attention
    except ImportError:
        return
    enable_hf_packed_attention()


def _wait_for_no_device() -> None:
    """Let a split model's rotary embeddings go on without waiting for their GPU.

    Unsloth waits there, once a layer, wherever it sees a split model (`_sync_if_split`): lanes then stand still
    together, and a step cannot be captured. Its kernels choose their GPU themselves, and copies between GPUs keep the
    order of both streams, so there is nothing to wait for.
    """
    for name in ("rope_embedding", "qk_norm_rope"):
        module: Any = sys.modules.get(f"unsloth.kernels.{name}")
        if hasattr(module, "_sync_if_split"):
            module._sync_if_split = _go_on


def _go_on(_: Any) -> None:
    """In place of a wait."""


def checkpointing(plan: Plan) -> bool | str:
    """The plan's checkpointing in Unsloth's words."""
    words: dict[str, bool | str] = {"none": False, "full": True, "unsloth": "unsloth"}
    return words[plan.gradient_checkpointing]
