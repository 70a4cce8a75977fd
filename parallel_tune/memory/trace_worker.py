"""The process that traces: the model's own code on fake tensors, so that planning itself needs no torch.

python -m parallel_tune.memory.trace_worker

Reads a line of JSON a question and writes a line an answer. The first question is the model, {"config": its
config.json, "known": whether the closed form describes it}, and is answered by what its config.json did not say; each
later one is {"settings", "part", "arrangement"}, answered by {"phases", "kept"}; see `trace.Tracer`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from parallel_tune.memory.facts import ModelFacts, facts_from_config
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.process import die_with_parent, importing, leave
from strategies.contracts import Arrangement, Part
from strategies.errors import ConfigError, ParallelTuneError

LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers that an extrapolation tells apart."""


class Worker:
    """Answers questions about one model."""

    def __init__(self, config: Mapping[str, Any], known: bool) -> None:
        self.facts = facts_from_config(config)
        self.overrides: dict[str, Any] | None = None
        if not known:
            self.overrides, self.facts = _completed(config, self.facts)
        self._tracers: dict[TrainingSettings, Any] = {}

    def said(self) -> dict[str, Any]:
        """What of the facts the caller cannot have read in config.json."""
        facts = self.facts
        return {
            "sliding_window": facts.sliding_window,
            "windowed_layers": facts.windowed_layers,
            "tied_embeddings": facts.tied_embeddings,
            "modules": asdict(facts.modules),
        }

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The phases of a step, and what it keeps."""
        with importing():
            from parallel_tune.memory.trace import Tracer

        values = {**question["settings"], "lora_targets": tuple(question["settings"]["lora_targets"])}
        settings = TrainingSettings(**values)
        tracer = self._tracers.setdefault(settings, Tracer(self.facts, settings, self.overrides))
        part, arrangement = Part(**question["part"]), Arrangement(**question["arrangement"])
        try:
            return {"phases": tracer.phases(part, arrangement), "kept": tracer.kept(part, arrangement)}
        except ValueError as error:
            if "scaled_dot_product_attention" in str(error):
                raise ConfigError(
                    f"a {self.facts.model_type} model cannot compute its attention by sdpa, as transformers has it",
                    "Add --attn_implementation eager, and --engine transformers.",
                ) from error
            if "arget modules" not in str(error):
                raise
            raise ConfigError(
                f"LoRA finds none of {', '.join(settings.lora_targets)} in a {self.facts.model_type} model",
                "Name its own linear layers with --target_modules, or all of them: --target_modules all-linear.",
            ) from error


def _completed(config: Mapping[str, Any], facts: ModelFacts) -> tuple[dict[str, Any], ModelFacts]:
    """The config with the defaults that transformers gives it, and the facts that follow from the built model.

    Raises:
        ConfigError: transformers does not know the model, or a few of its layers do not say what the others cost.
    """
    if isinstance(config.get("text_config"), Mapping):
        raise ConfigError(
            f"a {facts.model_type} model is a text model inside another one",
            "Only plain decoder-only language models can be traced.",
        )
    model, whole = _on_meta(config)
    kinds = whole.get("layer_types") or []
    foreign = set(kinds) - LAYER_KINDS
    if foreign:
        raise ConfigError(
            f"a {facts.model_type} model has layers of the kind {', '.join(sorted(foreign))}",
            "Only stacks of full and sliding attention can be traced.",
        )
    from parallel_tune.memory.anatomy import anatomy

    facts = replace(
        facts,
        windowed_layers=tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention") if kinds else (),
        sliding_window=int(whole.get("sliding_window") or 0),
        tied_embeddings=_is_tied(model),
        modules=anatomy(model, facts.num_layers),
    )
    _check_alike(facts, whole, model)
    return whole, facts


def _on_meta(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The whole model without bytes, and its config with all defaults."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        made = AutoConfig.for_model(**values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made)
    except Exception as error:  # each model's code has errors of its own
        what = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"transformers cannot build a {config.get('model_type')!r} model: {type(error).__name__}: {what[0][:80]}",
            "Only models that transformers has code for can be traced.",
        ) from error
    return model, made.to_dict()


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_alike(facts: ModelFacts, whole: Mapping[str, Any], model: Any) -> None:
    """Whether a stack of the first, a middle and the last layer has all there is to know about the others."""
    from parallel_tune.memory.fake_model import cut_config, cut_to

    if facts.num_layers < 3:
        return

    def parameters(layers: tuple[int, ...]) -> int:
        return sum(p.numel() for p in _on_meta(cut_config(whole, cut_to(facts, layers)))[0].parameters())

    first, last = 0, facts.num_layers - 1
    few = parameters((first, last))
    kinds = [(i in facts.windowed_layers, facts.is_mixture(i)) for i in range(1, last)]
    more = {kind: parameters((first, 1 + kinds.index(kind), last)) - few for kind in set(kinds)}
    expected = few + sum(more[kind] for kind in kinds)
    built = sum(parameter.numel() for parameter in model.parameters())
    if expected != built:
        raise ConfigError(
            f"the layers of this {facts.model_type} model differ: it has {built:,} parameters, and its first, one "
            f"middle and its last layer promise {expected:,}",
            "Only models whose layers are alike can be traced.",
        )


def main() -> None:
    """Answer until the questions end."""
    die_with_parent()
    warnings.simplefilter("ignore")
    # Libraries print what they like: answers go where they do not.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        worker: Worker | None = None
        for line in sys.stdin:
            question = json.loads(line)
            try:
                if worker is None:
                    worker = Worker(question["config"], question["known"])
                    answer = worker.said()
                else:
                    answer = worker.answer(question)
            except ParallelTuneError as error:
                answer = {"error": error.message, "hint": error.hint}
            except Exception as error:  # the model's own code, on tensors that it was not written for
                what = str(error).strip().splitlines() or [""]
                answer = {"failed": f"{type(error).__name__}: {what[0][:200]}", "trace": traceback.format_exc()}
            print(json.dumps(answer), file=out, flush=True)
    leave(0)


if __name__ == "__main__":
    main()
