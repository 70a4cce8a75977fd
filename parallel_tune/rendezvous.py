"""A rendezvous of one machine's processes on a loopback socket.

torchrun's own `--standalone` listens on all interfaces, unauthenticated. This handler, which torchrun finds through the
entry-point group `torchrun.handlers`, opens a TCPStore on 127.0.0.1 alone, on a port that the system chooses.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

BACKEND = "parallel_tune_loopback"


class LoopbackRendezvous(RendezvousHandler):
    """One agent, always the first and only one, whose store its workers use as well."""

    def __init__(self, run_id: str, timeout: timedelta) -> None:
        self._run_id = run_id
        listener = socket.create_server(("127.0.0.1", 0))
        self._port = listener.getsockname()[1]
        # The store takes the socket over, and with it the duty to close it.
        self._store = TCPStore(
            "127.0.0.1",
            self._port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing waits for a closed rendezvous of one agent."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def create_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """Called by torchrun."""
    return LoopbackRendezvous(parameters.run_id, timedelta(minutes=10))


def backend() -> object:
    """The entry point: torchrun asks it for the function that makes a handler."""
    return create_handler
