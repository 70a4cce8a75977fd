"""The transformers engine: AutoModelForCausalLM with peft adapters."""

from __future__ import annotations

from typing import Any

from parallel_tune.config import TrainConfig
from parallel_tune.engines import target_modules
from parallel_tune.hub_answers import why_not
from strategies.base import Session
from strategies.contracts import Plan
from strategies.errors import ConfigError


class TransformersEngine:
    """Loads with transformers, adapts with peft."""

    def prepare(self) -> None:
        """Nothing: transformers needs no preparation."""

    def load(self, config: TrainConfig, plan: Plan, session: Session, dtype: Any) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {}
        if config.load_in_4bit:
            options["quantization_config"] = nf4(dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                config.model,
                dtype=weights_dtype(config, dtype),
                device_map=session.device_map(),
                attn_implementation=config.attn_implementation,
                **options,
            )
        except OSError as error:
            told = why_not(error)
            if told is not None:  # transformers itself says the same of every error: that the name may be wrong
                raise ConfigError(f"cannot load the model {config.model!r} from the Hub: {told[0]}", told[1]) from error
            raise ConfigError(
                f"cannot load the model {config.model!r}: {error}",
                "Give a Hub id that you may read, or a local folder.",
            ) from error
        return model, load_tokenizer(config)

    def add_adapters(self, model: Any, config: TrainConfig, plan: Plan) -> Any:
        if config.full_finetuning:
            return model
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        from parallel_tune.engines.loftq import begin_with_loftq

        model.requires_grad_(False)
        set_seed(config.random_state)
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                bias=config.bias,
                target_modules=target_modules(config),
                use_rslora=config.use_rslora,
                use_dora=config.use_dora,
                task_type="CAUSAL_LM",
            ),
        )
        if config.loftq_config is not None:
            begin_with_loftq(adapted, config.model, config.r)
        return adapted

    def training_arguments(self, plan: Plan) -> dict[str, Any]:
        if plan.gradient_checkpointing == "none":
            return {"gradient_checkpointing": False}
        return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def nf4(dtype: Any) -> Any:
    """4-bit nf4 with double quantization, computing in `dtype`.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--load_in_4bit needs bitsandbytes, which is not installed", "`pip install bitsandbytes`."
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def weights_dtype(config: TrainConfig, dtype: Any) -> Any:
    """Weights that train need more than float16's range: they stay in float32 under fp16 autocast."""
    import torch

    return torch.float32 if config.full_finetuning and dtype == torch.float16 else dtype


def load_tokenizer(config: TrainConfig) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    except Exception as error:  # whatever its files make the libraries raise is about this model
        said = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"cannot load the tokenizer of {config.model!r}: {said}",
            "Give a model that comes with its tokenizer.",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
