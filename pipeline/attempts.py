"""How often a piece of work was begun and not finished, beyond the life of a worker."""

from __future__ import annotations

import ray
from ray.actor import ActorHandle


class ActorAttempts:
    """What a tiling task holds of the actor `Deaths`, which the driver makes."""

    def __init__(self, deaths: ActorHandle) -> None:
        self._deaths = deaths

    def begin(self, name: str) -> int:
        """Counts an attempt; gives the number of earlier ones that did not come to an end."""
        earlier: int = ray.get(self._deaths.begin.remote(name))
        return earlier

    def finish(self, name: str) -> None:
        self._deaths.finish.remote(name)
