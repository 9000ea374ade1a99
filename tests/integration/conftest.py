"""One local cluster for all tests that drive the dataflow in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from jobs.cluster import connect


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    connect(local=True)
    yield
    ray.shutdown()
