"""One optimizer step as the Trainer takes it, for counting what it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from parallel_tune.chunked_loss import chunked_loss, form_of
from parallel_tune.memory.anatomy import anatomy
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.fake_model import build_model
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.states import BNB_8BIT_SMALLEST
from parallel_tune.memory.tracker import LiveBytes
from strategies.contracts import Arrangement, Part


class TrainingStep:
    """One optimizer step as the Trainer takes it, on the tensors of the surrounding mode."""

    def __init__(
        self,
        facts: ModelFacts,
        settings: TrainingSettings,
        part: Part,
        arrangement: Arrangement,
        overrides: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        self.facts, self.settings, self.part, self.arrangement = facts, settings, part, arrangement
        self.device = torch.device(device)
        self.model: Any = build_model(facts, settings, part, self.device, overrides)
        if arrangement.gradient_checkpointing != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if settings.method == "lora" and part.embedding:
                # TRL does so for adapters; the embedding's output then keeps a gradient of its own.
                self.model.enable_input_require_grads()
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.trainable, settings)
        self.names = anatomy(self.model, facts.num_layers)
        self.tracker = LiveBytes()
        self.stored_bytes = 0

    def peaks_bytes(self) -> dict[str, int]:
        """Peaks of a step that finds the optimizer's states there, as all but the first one do."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for module in self.model.modules():
            tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        with self.tracker:
            self.tracker.count(tensors)
            self._mark_phases()
            for parameter in self.trainable:
                parameter.grad = torch.zeros_like(parameter)
            self._update()
            self.tracker.reset()
            self.take()
        return dict(self.tracker.peaks_bytes)

    def kept(self) -> dict[str, int]:
        """What the model and its optimizer keep, by what it is; see `Trace`."""
        trainable = sum(parameter.numel() for parameter in self.trainable)
        adapters = sum(parameter.nbytes for parameter in self.trainable)
        held = {id(tensor): tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())}
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        lora = self.settings.method == "lora"
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        whole = [p for p in self.trainable if id(p) in embeddings or p.numel() < BNB_8BIT_SMALLEST]
        return {
            "weights": sum(held.values()) - (adapters if lora else 0),
            "adapters": adapters if lora else 0,
            "gradients": adapters,
            "optimizer": sum(state.nbytes for state in states if isinstance(state, torch.Tensor)),
            "stored": self.stored_bytes,
            "trainable": trainable,
            "float32_states": sum(parameter.numel() for parameter in whole),
        }

    def take(self) -> None:
        micro_steps = min(2, self.arrangement.gradient_accumulation_steps)
        for _ in range(micro_steps):
            self.tracker.enter_phase("forward")
            self._micro_step()
        self._update()

    def _update(self) -> None:
        self.tracker.enter_phase("optimizer")
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        # DDP's buckets outlive the step, and gradients are views into them.
        self.optimizer.zero_grad(set_to_none=self.arrangement.processes == 1)

    def _micro_step(self) -> None:
        shape = (self.arrangement.micro_batch, self.settings.sequence_length)
        inputs = self._inputs(shape)
        dtype = getattr(torch, self.settings.compute_dtype)
        autocast = torch.autocast(self.device.type, dtype) if self.settings.autocast else contextlib.nullcontext()
        if not self.part.head:
            before = self.tracker.live_bytes
            with autocast:
                hidden = self._body()(**inputs, use_cache=False).last_hidden_state
            self.stored_bytes = self.tracker.live_bytes - before
            gradient = torch.empty_like(hidden)
            hidden.backward(gradient)
            return
        self._loss(inputs, shape, autocast).backward()  # type: ignore[no-untyped-call]

    def _loss(
        self, inputs: dict[str, torch.Tensor], shape: tuple[int, int], autocast: contextlib.AbstractContextManager[Any]
    ) -> torch.Tensor:
        labels = torch.zeros(shape, dtype=torch.long, device=self.device)
        count = torch.ones((), dtype=torch.long, device=self.device)
        if self.settings.cross_entropy == "fused":
            with autocast:
                hidden = self._body()(**inputs, use_cache=False).last_hidden_state
                head = self.model.get_submodule(self.names.head)
                return chunked_loss(
                    hidden, head.weight, head.bias, labels, count, form_of(self.model.config.get_text_config())
                )
        with autocast:
            outputs = self.model(**inputs, labels=labels, num_items_in_batch=count, use_cache=False)
        outputs.logits = outputs.logits.float()  # accelerate does so to all outputs of a 16-bit run
        loss: torch.Tensor = outputs.loss
        return loss

    def _inputs(self, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {}
        if self.part.embedding:
            inputs["input_ids"] = torch.zeros(shape, dtype=torch.long, device=self.device)
        else:
            dtype = getattr(torch, self.settings.compute_dtype)
            inputs["inputs_embeds"] = torch.zeros(
                (*shape, self.facts.hidden_size), dtype=dtype, device=self.device, requires_grad=True
            )
        if self.settings.masked(shape[0]):
            # The finished mask: how it is made depends on values, which fake tensors have none of.
            square = (shape[0], 1, shape[1], shape[1])
            kind = getattr(torch, self.settings.compute_dtype) if self.settings.eager_attention else torch.bool
            inputs["attention_mask"] = torch.ones(square, dtype=kind, device=self.device)
        return inputs

    def _mark_phases(self) -> None:
        layers = self.model.get_submodule(self.names.layers)
        last = len(layers) - 1

        def name_of(index: int) -> str:
            if index == 0:
                return "backward_bottom"
            return "backward_top" if index == last else "backward_middle"

        def mark(index: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad and torch._C._current_graph_task_id() == -1:
                    hidden.register_hook(lambda _gradient: self.tracker.enter_phase(name_of(index)))

            return hook

        for index, layer in enumerate(layers):
            layer.register_forward_hook(mark(index))
        if self.part.head:
            # A fused loss takes the head's weight and never calls it: then the loss begins where the body ends.
            enter = lambda *_: self.tracker.enter_phase("cross_entropy")  # noqa: E731
            if self.settings.cross_entropy == "fused":
                self._body().register_forward_hook(enter)
            else:
                self.model.get_submodule(self.names.head).register_forward_pre_hook(enter)

    def _body(self) -> Any:
        """All but the head."""
        return getattr(self.model, self.model.base_model_prefix)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """transformers takes fake tensors for a compiler's and then makes masks that a run does not make; peft's 4-bit
    layer asks for CUDA's autocast by name, whatever the device."""
    from transformers import masking_utils

    enabled = torch.is_autocast_enabled
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)),
        mock.patch.object(masking_utils, "is_tracing", lambda *_: False),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_: None),
    ):
        yield


def _optimizer(parameters: list[torch.nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """torch's AdamW, by the implementation that CUDA would take."""
    if settings.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
