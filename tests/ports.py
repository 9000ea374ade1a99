"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

# Above those of Ray's workers, below those that the kernel gives to whoever asks for any.
FIRST, LAST = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    draw = random.SystemRandom()  # two test processes must not draw the same
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            port = draw.randint(FIRST, LAST)
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports
