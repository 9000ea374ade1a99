"""How many cores a process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """At least 1: the cores of this process's affinity, and no more than its container's quota.

    `os.cpu_count()` gives those of the machine, of which a container may have two of 64.
    """
    from ray._private.utils import get_num_cpus  # half a second, where nobody has loaded Ray

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(affinity or 1, int(get_num_cpus(override_docker_cpu_warning=True))))
