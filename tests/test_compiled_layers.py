"""Layers compiled for what is recorded: eager passes keep the stock ones, what cannot be compiled is recorded as it is.

The backend here runs what torch.compile traced, operation by operation, so that no compiler is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lane_steps import CPU, CUTS, assert_same, batches, in_lanes, naive, tiny
from op_tape import OperationTape
from test_replay import Again, Constant, steps, train
from torch import Tensor, nn

from parallel_tune.capture import replayed
from parallel_tune.config import make_config
from parallel_tune.hardware import parse_hardware
from parallel_tune.memory.lookup import load_model_facts
from parallel_tune.plan_view import render_plan
from parallel_tune.planning import make_plan
from parallel_tune.row_attention import use_row_attention
from strategies.compiled_layers import CompiledLayers
from strategies.contracts import Plan
from strategies.errors import ConfigError
from strategies.pipeline import Lanes
from strategies.registry import load_registry
from strategies.replay import Replay
from strategies.stage_capture import StageCapture
from strategies.stages import split

# Dynamo looks at the gradients of tensors that are no leaves, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Layer(nn.Module):
    """torch's own modules are not compiled by themselves."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs).tanh()
        return outputs


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(6, 8), nn.Tanh(), Layer(8, 1))


class Backend:
    """Counts what was compiled, and runs it as it was traced; or fails."""

    def __init__(self, error: Exception | None = None, factor: float = 1.0) -> None:
        self.graphs = self.runs = 0
        self.error = error
        self.factor = factor

    def __call__(self, graph: Any, _examples: Any) -> Callable[..., Any]:
        if self.error is not None:
            raise self.error
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return [output * self.factor for output in graph.forward(*arguments)]

        return run


@pytest.fixture(autouse=True)
def nothing_compiled_stays() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_layers_are_compiled_within_and_themselves_outside() -> None:
    model, backend = build(), Backend()
    layers = CompiledLayers([model[0], model[2]], backend)
    inputs = torch.ones(3, 6)
    expected = model(inputs)
    assert backend.graphs == 0
    with layers.used():
        assert torch.equal(model(inputs), expected)
        assert (backend.graphs, backend.runs) == (2, 2)
    model(inputs)
    assert backend.runs == 2
    with layers.used():
        model(inputs)
    assert (backend.graphs, backend.runs) == (2, 4)
    assert set(model.state_dict()) == set(build().state_dict())


def test_a_replica_compiles_before_it_records_and_trains_alike() -> None:
    data = steps(4)
    expected = train(build(), data, None)
    model, backend = build(), Backend()
    replay = Replay(
        lambda: list(model.parameters()), torch.device("cpu"), Again(), compiled=CompiledLayers([model[0]], backend)
    )
    assert train(model, data, replay) == pytest.approx(expected, rel=1e-6)
    assert backend.graphs == backend.runs == len(replay.report.sizes) > 0
    assert replay.report.compiled and replay.report.uncompiled_reason is None


def test_what_a_replica_records_is_the_compiled_layers() -> None:
    data = steps(4)
    expected = train(build(), data, None)
    model, backend = build(), Backend()
    parameters = list(model.parameters())
    layers = CompiledLayers([model[0]], backend)
    # This recorder does the work when it records, and is found out after its first recording.
    replay = Replay(lambda: parameters, torch.device("cpu"), Constant(parameters), compiled=layers)
    assert train(model, data, replay) == pytest.approx(expected, rel=1e-6)
    assert replay.report.reason is not None
    assert (backend.graphs, backend.runs) == (1, 2)


def test_what_cannot_be_compiled_is_recorded_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    data = steps(4)
    expected = train(build(), data, None)
    model, backend = build(), Backend(RuntimeError("no compiler"))
    layers = CompiledLayers([model[0]], backend)
    replay = Replay(lambda: list(model.parameters()), torch.device("cpu"), Again(), compiled=layers)
    with caplog.at_level(logging.WARNING):
        assert train(model, data, replay) == pytest.approx(expected, rel=1e-6)
    report = replay.report
    assert report.reason is None and report.recordings > 0
    assert report.uncompiled_reason is not None and "no compiler" in report.uncompiled_reason
    assert caplog.text.count("layers are not compiled") == 1
    assert "layers were not compiled, since torch.compile failed" in replayed(vars(report))


class AsRecorded(Again):
    """Repeats work with the layers as they were when it was recorded."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        then = self.layer._compiled_call_impl

        def as_then() -> Tensor:
            self.layer._compiled_call_impl = then
            try:
                return work()
            finally:
                self.layer._compiled_call_impl = None

        return super().record(as_then)


@pytest.mark.parametrize(("factor", "reason"), [(1.08, None), (3.0, "off those of the same step run eagerly")])
def test_compiled_layers_may_round_otherwise_but_not_compute_otherwise(factor: float, reason: str | None) -> None:
    """A recording is held against a compiled pass, and that one against the same pass as it is."""
    model, backend = build(), Backend(factor=factor)
    layers = CompiledLayers([model[0]], backend)
    replay = Replay(lambda: list(model.parameters()), torch.device("cpu"), AsRecorded(model[0]), compiled=layers)
    train(model, steps(4), replay)
    report = replay.report
    assert report.reason is None and report.recordings > 0
    assert report.gradient_error < 1e-6 < 0.05 < report.compiled_error
    if reason is None:
        assert report.uncompiled_reason is None
    else:
        assert report.uncompiled_reason is not None and reason in report.uncompiled_reason


def test_layers_that_are_alike_share_what_is_compiled_in_every_stage_and_size() -> None:
    """Of twelve layers with adapters two kinds a stage: those whose input needs no gradient, or comes from elsewhere,
    and the others. Together they are more than torch.compile takes by itself."""
    model, backend = tiny("lora", layers=12), Backend()
    use_row_attention(model)
    stages = split(model, [0, 6], [CPU] * 2)
    layers, sizes = CompiledLayers(stages.anatomy.layers, backend), (4, 5, 6)
    for size in sizes:
        ids = torch.full((1, size), 3)
        with layers.used():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert backend.graphs == 4 * len(sizes)
    assert backend.runs == 12 * len(sizes)


def test_more_forms_than_can_be_compiled_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.compiled_layers.MOST_VARIANTS", 1)
    model = build()
    replay = Replay(
        lambda: list(model.parameters()), torch.device("cpu"), Again(), compiled=CompiledLayers([model[0]], Backend())
    )
    train(model, steps(4), replay)
    assert replay.report.reason is None and len(replay.report.sizes) == 2
    assert "limit" in str(replay.report.uncompiled_reason)


class Watching(OperationTape):
    """Notes whether a layer is the compiled one while its work is recorded."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.compiled: list[bool] = []

    def begin(self, lane: int, stage: int) -> None:
        self.compiled.append(self.layer._compiled_call_impl is not None)
        super().begin(lane, stage)


class Counting(CompiledLayers):
    """Counts how often the layers are put in place."""

    times = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        self.times += 1
        with super().used():
            yield


def test_stages_are_recorded_of_compiled_layers_which_one_pass_compiles_for_all_lanes() -> None:
    """The tape records by a dispatch mode, under which torch leaves compiled code alone; so this shows that the layers
    are in place, and that everything around them gives the naive gradients, not that compiled code was recorded."""
    model, backend = tiny("lora"), Backend()
    use_row_attention(model)
    stages = split(model, CUTS[2], [CPU] * 2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers, tape = Counting(stages.anatomy.layers, backend), Watching(stages.anatomy.layers[0])
    captured = StageCapture(stages, lambda: trained, tape, layers)
    inputs = batches(4)
    expected = naive(model, inputs)
    with Lanes(stages, 2, captured=captured) as lanes:
        for _ in range(2):
            assert_same(expected, in_lanes(lanes, model, inputs))
    assert backend.graphs == len(stages.anatomy.layers)
    assert tape.compiled and all(tape.compiled)
    assert stages.anatomy.layers[0]._compiled_call_impl is None
    assert layers.times == 2 * len(captured.report.sizes) > 0
    assert (captured.report.reason, captured.report.uncompiled_reason) == (None, None)
    assert captured.report.replayed_elements > 0


def plan_of(**options: Any) -> Plan:
    config = make_config({"model": "Qwen/Qwen3-8B", "strategy": "ddp", "torch_compile": True, **options})
    hardware = parse_hardware("2xH100-80GB")
    engine = "unsloth" if options.get("engine") == "unsloth" else "transformers"
    return make_plan(config, load_model_facts(config.model), engine, hardware, load_registry())


def test_a_plan_says_that_layers_are_compiled() -> None:
    plan = plan_of(max_seq_length=512, capture="on")
    assert plan.compiled
    assert "of compiled layers" in render_plan(plan)
    with pytest.raises(ConfigError, match="none are: --capture off"):
        plan_of(capture="off")
    with pytest.raises(ConfigError, match="Unsloth has kernels of its own"):
        plan_of(engine="unsloth")
