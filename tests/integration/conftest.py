"""A local cluster for the tests of a file that drive the dataflow in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from jobs.cluster import connect


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Gone with its file: another may need a cluster of its own kind in this process."""
    connect(local=True)
    yield
    ray.shutdown()
