"""Random numbers that do not depend on the order in which lanes run.

Each part of a micro-batch starts its device's generator at a number made from (seed, call, micro-batch, stage): dropout
masks are then the same for any number of lanes. A checkpoint stores and restores the generator by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def generator_of(device: torch.device) -> torch.Generator:
    """The default generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def get_states(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """The generator state of each device, and of the CPU."""
    return {device: generator_of(device).get_state() for device in {torch.device("cpu"), *devices}}


def set_states(states: Mapping[torch.device, Tensor]) -> None:
    """Put generators back to what `get_states` found."""
    for device, state in states.items():
        generator_of(device).set_state(state)


def begin_at(key: int, devices: Iterable[torch.device]) -> None:
    """Let each device's generator begin at a number of its own, made from the key."""
    for place, device in enumerate(devices):
        generator_of(device).manual_seed(seed_of(key, place))


def leave_capture(device: torch.device) -> None:
    """Let a GPU's generator be used again after a capture that failed, which leaves it waiting for the capture's end.

    It goes on with the numbers that it would have given. Graphs captured with it must not be replayed any more.
    """
    generator = generator_of(device)
    generator.graphsafe_set_state(generator.clone_state())


def seed_of(*key: int) -> int:
    """A seed of 63 bits that tells keys apart; the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
