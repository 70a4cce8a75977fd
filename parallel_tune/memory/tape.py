"""A reverse-mode tape that moves no numbers, only bytes: which tensors live when, through forward and backward.

Autograd keeps what each operation's derivative needs, frees it when that derivative has run, and adds up the gradients
that reach a tensor on several ways. Those three rules, applied to the operations of a layer, give its memory exactly;
they are the rules of torch's engine (torch/csrc/autograd/engine.cpp, input_buffer.cpp) and of derivatives.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Buffer:
    """A tensor's storage: freed when nobody refers to it."""

    size_bytes: int
    references: int = 1


@dataclass(slots=True, eq=False)
class Value:
    """A tensor of the forward pass. `gradient` is what has reached it so far."""

    buffer: Buffer
    needs_gradient: bool
    gradient: Buffer | None = None

    @property
    def size_bytes(self) -> int:
        return self.buffer.size_bytes


@dataclass(slots=True, eq=False)
class Node:
    """A derivative waiting to run.

    Attributes:
        saved: what it keeps alive until then.
        gradients: the inputs that get a gradient, and its bytes; None hands the output's own on.
        weight_gradients: bytes of each trained weight's gradient.
        scratch_bytes: what it holds only while it runs.
    """

    output: Value
    saved: tuple[Buffer, ...]
    gradients: tuple[tuple[Value, int | None], ...]
    weight_gradients: tuple[int, ...]
    scratch_bytes: int


@dataclass(slots=True)
class Tape:
    """Counts live bytes while a layer's operations are written down and then played backwards.

    Attributes:
        gradients_exist: weights have a gradient already, so a new one is added to it and freed.
        weight_gradient_bytes: gradients of weights that backward has left behind; part of `live_bytes`.
        peak_bytes: the largest `live_bytes` since `reset_peak`.
        peak_weight_gradient_bytes: how much of the peak were weights' gradients.
        peak_when_last_saved_bytes: the peak when an operation last kept a tensor: recomputation stops there.
        live_before_saved_bytes: live when backward first needed a kept tensor: recomputation starts there.
    """

    gradients_exist: bool = False
    live_bytes: int = 0
    peak_bytes: int = 0
    weight_gradient_bytes: int = 0
    peak_weight_gradient_bytes: int = 0
    peak_when_last_saved_bytes: int = 0
    live_before_saved_bytes: int = 0
    nodes: list[Node] = field(default_factory=list)

    def reset_peak(self) -> None:
        """Measure the peak anew from here."""
        self.peak_bytes = self.live_bytes
        self.peak_weight_gradient_bytes = self.weight_gradient_bytes

    def value(self, size_bytes: int, needs_gradient: bool = False) -> Value:
        """A tensor from outside."""
        return Value(self.hold(size_bytes), needs_gradient)

    def operation(
        self,
        size_bytes: int,
        gradients: tuple[tuple[Value, int | None], ...],
        saved: tuple[Value | Buffer, ...] = (),
        weight_gradients: tuple[int, ...] = (),
        scratch_bytes: int = 0,
        backward_scratch_bytes: int = 0,
        save_output: bool = False,
    ) -> Value:
        """Run an operation and write down its derivative.

        Args:
            size_bytes: of the result.
            gradients: each input, and the bytes of the gradient it gets; None if it shares the result's.
            saved: what the derivative keeps.
            save_output: it keeps the result too.
        """
        wanted = tuple(pair for pair in gradients if pair[0].needs_gradient)
        if saved and (wanted or weight_gradients):
            self.peak_when_last_saved_bytes = self.peak_bytes
        output = Value(self.hold(size_bytes), bool(wanted or weight_gradients))
        self._touch(scratch_bytes)
        if output.needs_gradient:
            kept = [item.buffer if isinstance(item, Value) else item for item in saved]
            if save_output:
                kept.append(output.buffer)
            for buffer in kept:
                buffer.references += 1
            self.nodes.append(Node(output, tuple(kept), wanted, weight_gradients, backward_scratch_bytes))
        return output

    def view(self, source: Value, gradient_bytes: int | None = None) -> Value:
        """Another look at the same storage; `gradient_bytes` when its gradient must be spread out for the source."""
        output = Value(source.buffer, source.needs_gradient)
        source.buffer.references += 1
        if output.needs_gradient:
            self.nodes.append(Node(output, (), ((source, gradient_bytes),), (), 0))
        return output

    def drop(self, *values: Value) -> None:
        """Python lets go of these names."""
        for value in values:
            self.release(value.buffer)

    def backward(self, output: Value, gradient_bytes: int | None = None) -> None:
        """Play the tape backwards from a gradient of `output`."""
        output.gradient = self.hold(output.size_bytes if gradient_bytes is None else gradient_bytes)
        self.live_before_saved_bytes = 0
        while self.nodes:
            if self.nodes[-1].saved and not self.live_before_saved_bytes:
                self.live_before_saved_bytes = self.live_bytes
            self._run(self.nodes.pop())

    def hold(self, size_bytes: int) -> Buffer:
        """Allocate."""
        self.live_bytes += size_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_weight_gradient_bytes = self.weight_gradient_bytes
        return Buffer(size_bytes)

    def release(self, buffer: Buffer) -> None:
        """Drop one reference, and free at the last."""
        buffer.references -= 1
        if not buffer.references:
            self.live_bytes -= buffer.size_bytes

    def _touch(self, size_bytes: int) -> None:
        if size_bytes:
            self.release(self.hold(size_bytes))

    def _run(self, node: Node) -> None:
        incoming = node.output.gradient
        if incoming is None:
            for buffer in node.saved:
                self.release(buffer)
            return
        made: list[tuple[Value, Buffer]] = []
        for value, size_bytes in node.gradients:
            if size_bytes is None:
                incoming.references += 1
                made.append((value, incoming))
            else:
                made.append((value, self.hold(size_bytes)))
        weights = [self.hold(size_bytes) for size_bytes in node.weight_gradients]
        self._touch(node.scratch_bytes)
        node.output.gradient = None
        self.release(incoming)
        for buffer in node.saved:
            self.release(buffer)
        for buffer in weights:
            if self.gradients_exist:
                self.release(buffer)
            else:
                self.weight_gradient_bytes += buffer.size_bytes
        for value, buffer in made:
            self._accumulate(value, buffer)

    def _accumulate(self, value: Value, buffer: Buffer) -> None:
        if value.gradient is None:
            value.gradient = buffer
            return
        total = self.hold(buffer.size_bytes)
        self.release(value.gradient)
        self.release(buffer)
        value.gradient = total
