"""When a stage is held back: by what waits behind it, whatever its bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

from pipeline import long_runs
from pipeline.long_runs import QueueLimit


def can_add(source: object, waiting: int) -> bool:
    operator = SimpleNamespace(input_dependencies=[source])
    state = SimpleNamespace(output_queue=SimpleNamespace(num_blocks=waiting))
    limit = QueueLimit.__new__(QueueLimit)  # Ray makes it with a context and a resource manager
    limit._topology = _Topology({id(operator): state})
    return limit.can_add_input(operator)


class _Topology:
    """Namespaces have no hash."""

    def __init__(self, states: dict[int, SimpleNamespace]) -> None:
        self._states = states

    def __getitem__(self, operator: object) -> SimpleNamespace:
        return self._states[id(operator)]


@pytest.mark.parametrize(
    ("feeds", "limit"), [(True, long_runs.WAITING_SHARDS), (False, long_runs.WAITING_CHUNKS)]
)
def test_a_stage_is_held_back_at_its_limit(feeds: bool, limit: int) -> None:
    source = InputDataBuffer.__new__(InputDataBuffer) if feeds else object()
    assert can_add(source, limit - 1)
    assert not can_add(source, limit)
