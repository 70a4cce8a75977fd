"""Which of a model's layers get adapters: names that it has not, and adapters that peft has not, are refused."""

from __future__ import annotations

from parallel_tune.config import LORA_TARGETS, TrainConfig
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.parameters import EXPERT_TARGETS, adapted_experts, layer_linears
from strategies.errors import ConfigError


def check_targets(config: TrainConfig, facts: ModelFacts) -> None:
    """Refuse names that get no adapter, and adapters of a kind that peft has not.

    Raises:
        ConfigError: a name of an embedding or a head, or of a layer that the model has not; what peft does not do with
            a mixture's experts.
    """
    if config.full_finetuning:
        return
    _check_experts(config, facts)
    if "all-linear" in config.target_modules:
        return
    # Unsloth would train them in full beside the adapters, in float32; TRL refuses an adapter on a head.
    outside = {name.rpartition(".")[2] for name in (*facts.modules.embedding, facts.modules.head)}
    wanted = [target for target in config.target_modules if target.rpartition(".")[2] in outside]
    if wanted:
        raise ConfigError(
            f"target_modules names {', '.join(wanted)}: embeddings and heads get no adapters",
            "Name linear layers of the model's layers, or train all weights with --full_finetuning.",
        )
    linears, missing = _found(config, facts)
    if len(missing) == len(config.target_modules):
        raise ConfigError(
            f"target_modules = {','.join(config.target_modules)}: {config.model} has no such linear layer",
            f"It has {', '.join(linears)}; or use all-linear.",
        )
    # The default names stand for all that a model may have; names that were chosen are meant.
    if missing and tuple(config.target_modules) != LORA_TARGETS:
        raise ConfigError(
            f"target_modules names {', '.join(missing)}, which {config.model} has not: peft would pass over it",
            f"It has {', '.join(linears)}; or use all-linear.",
        )


def _check_experts(config: TrainConfig, facts: ModelFacts) -> None:
    """Experts are stacked in two tensors a layer, to whose sums with their adapters peft puts its products."""
    targets = tuple(config.target_modules)
    names = EXPERT_TARGETS.get(facts.model_type, ())
    halves = [name for name in names[:2] if name in targets]
    if len(halves) == 1 and any(facts.is_mixture(layer) for layer in range(facts.num_layers)):
        missing = next(name for name in names[:2] if name not in halves)
        raise ConfigError(
            f"target_modules names {halves[0]} without {missing}: the experts of {config.model} hold both as one",
            "Name both or neither.",
        )
    adapted = [adapted_experts(facts, layer, targets) for layer in range(facts.num_layers)]
    if config.use_rslora and any(gates for gates, _ in adapted):
        # Its two matrices for both have twice the rank and twice alpha, which alone would be right.
        raise ConfigError(
            f"use_rslora: peft scales the adapters on the first products of the experts of {config.model} by "
            "1.41 * alpha / sqrt(r), not by alpha / sqrt(r)",
            "Drop --use_rslora and give the --lora_alpha that scales alike, or name only attention's --target_modules.",
        )
    if not any(any(each) for each in adapted):
        return
    for name, given in (("use_dora", config.use_dora), ("lora_dropout", config.lora_dropout)):
        if given:
            what = "DoRA" if name == "use_dora" else "dropout"
            raise ConfigError(
                f"{name}: peft has no {what} for the experts of {config.model}",
                f"Drop --{name}, or name only attention's --target_modules.",
            )


def _found(config: TrainConfig, facts: ModelFacts) -> tuple[list[str], list[str]]:
    """The model's linear layers, and those of the targets that it has not, as far as its layers are known."""
    if config.full_finetuning or "all-linear" in config.target_modules or not facts.closed_form_known:
        return [], []
    linears = {linear.name for layer in range(facts.num_layers) for linear in layer_linears(facts, layer)}
    experts = set(EXPERT_TARGETS.get(facts.model_type, ()))
    # What peft finds beside the layers' linears: other modules that have weights.
    known = linears | experts | {"gate", "router"}
    missing = [target for target in config.target_modules if target.rpartition(".")[2] not in known]
    if facts.extra_parameters and len(missing) < len(config.target_modules):
        missing = []  # the vision tower has linears of its own
    return sorted(linears), missing


def unadapted(config: TrainConfig, facts: ModelFacts) -> tuple[str, ...]:
    """What a plan says where a model has not all of the default targets."""
    _, missing = _found(config, facts)
    if not missing:
        return ()
    there = sorted(set(config.target_modules) - set(missing))
    return (
        f"LoRA adapters lie only on {', '.join(there)}: a {facts.model_type} model has no "
        f"{', '.join(sorted(missing))}; --target_modules all-linear adapts all of its linear layers",
    )
