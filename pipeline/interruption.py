"""Stops a running dataset from outside. Ray Data offers callbacks at every step, and no other way.

A module of its own, and light: Ray sends the class by name to every worker.
"""

from __future__ import annotations

import threading
from typing import ClassVar

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor


class FlowStopped(Exception):
    """The dataset's iterator ends with it once `Interruption.stop` is set."""


class Interruption(ExecutionCallback):  # type: ignore[misc]
    """Makes Ray Data's scheduling loop end by an exception, so that it cleans up after itself.

    Merely leaving its threads behind is not enough: they call Ray after `ray.shutdown()`, which
    then starts a second cluster and takes the process down with it (exit status 1, no message).
    """

    stop: ClassVar[threading.Event] = threading.Event()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        if self.stop.is_set():
            raise FlowStopped
