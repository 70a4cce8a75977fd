"""Predicts memory and time before anything runs: facts of a model, closed-form formulas, a traced check."""

from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.facts import ModelFacts, facts_from_config
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.memory.settings import MachineConstants, TrainingSettings

__all__ = [
    "ClosedFormEstimator",
    "MachineConstants",
    "ModelFacts",
    "TrainingSettings",
    "facts_from_config",
    "load_model_facts",
]
