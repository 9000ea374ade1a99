"""A local cluster for the tests of a file that drive the dataflow in their own process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from jobs.cluster import connect


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Gone with its file: another may need a cluster of its own kind in this process."""
    before = dict(os.environ)  # what `connect` sets there is for its own cluster
    connect(local=True)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
