"""What keeps one execution of Ray Data flat in the driver's memory, however many shards it takes.

A module of its own, and light: Ray sends the classes by name to every worker.
"""

from __future__ import annotations

from ray.data._internal.execution.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

WAITING_SHARDS = 64  # fed and not yet being read, beyond those of one input block
WAITING_CHUNKS = 1000  # behind any other stage: some 5 MiB of the driver's memory


class DropBlockStats(ExecutionCallback):  # type: ignore[misc]
    """Drops what Ray Data keeps of every block until the end, for a summary nobody reads.

    Called at every step, in the thread of its scheduling loop, which alone touches the lists.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        for operator in executor._topology:
            if isinstance(operator, MapOperator):
                operator._output_blocks_stats.clear()


class QueueLimit(BackpressurePolicy):  # type: ignore[misc]
    """Gives a stage no more to do while much of what it did still waits for the next one.

    Ray Data bounds what waits between stages by its bytes alone. A shard's row has next to none,
    and a chunk of one small picture few; each costs the driver some KiB.
    """

    def can_add_input(self, op: PhysicalOperator) -> bool:
        feeds = any(isinstance(source, InputDataBuffer) for source in op.input_dependencies)
        waiting = self._topology[op].output_queue.num_blocks
        return bool(waiting < (WAITING_SHARDS if feeds else WAITING_CHUNKS))
