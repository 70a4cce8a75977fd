"""Decoder layers that torch.compile compiles for what is recorded; eager passes keep the layers as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

_log = logging.getLogger(__name__)

MOST_VARIANTS = 256
"""How many forms of a layer's code are compiled: one for each size, device and stage, and one more where nothing before
the layer trains. Of torch's own 8 a few sizes would leave none, and the layers that come after would stay as they are
with no more than a warning."""


class CompiledLayers:
    """Compiles layers when they are first used, for each size that is recorded.

    Layers of one kind share what is compiled. A compiled pass may round otherwise than an eager one; what is recorded
    of it is checked against an eager pass like any recording.

    Attributes:
        reason: why nothing is compiled any more; None while all is well.
    """

    def __init__(self, layers: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
        self._layers = tuple(layers)
        self._backend = backend
        self._calls: list[Any] = []
        self.reason: str | None = None

    def give_up(self, reason: str) -> None:
        """Leave the layers as they are from here on."""
        _log.warning("layers are not compiled, since %s", reason)
        self.reason = reason

    @contextmanager
    def used(self) -> Iterator[None]:
        """While entered, the layers are the compiled ones, unless that was given up."""
        if self.reason is not None:
            yield
            return
        if not self._calls:
            for layer in self._layers:
                # Sizes are few and fixed: kernels made for them are faster than those for any size.
                layer.compile(dynamic=False, backend=self._backend)
            self._calls = [layer._compiled_call_impl for layer in self._layers]
        self._set(self._calls)
        try:
            with many_variants():
                yield
        finally:
            self._set([None] * len(self._layers))

    def _set(self, calls: Sequence[Any]) -> None:
        for layer, call in zip(self._layers, calls, strict=True):
            layer._compiled_call_impl = call


def many_variants() -> AbstractContextManager[Any]:
    """Within it torch.compile compiles up to `MOST_VARIANTS` forms of a function, and says it when there are more.

    Raises:
        Exception: within it, torch's own, where more are wanted.
    """
    from torch._dynamo import config

    patched: AbstractContextManager[Any] = config.patch(
        recompile_limit=MOST_VARIANTS,
        accumulated_recompile_limit=MOST_VARIANTS,
        fail_on_recompile_limit_hit=True,
        suppress_errors=False,  # which Unsloth sets where it is imported; torch refuses both at once
    )
    return patched
