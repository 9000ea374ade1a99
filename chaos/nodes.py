"""Several Ray nodes on this machine, each of whose processes can be killed.

`ray.cluster_utils.Cluster` starts them as `ray start` would; the job finds them by RAY_ADDRESS. The
head has no CPUs: the driver runs there, the work on the workers, as on a cluster of GPU machines.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import psutil
from ray._private.node import Node
from ray.cluster_utils import Cluster

from chaos.processes import descendants, reap_raylets

HEAD_STORE_BYTES = 150 << 20
WORKER_STORE_BYTES = 400 << 20
NODE_CPUS = 4
WORKERS = 2
# Ray's patience, in seconds where its defaults are tens of them: with those, a lost node is noticed
# after about 20 s and a lost GCS after 60.
RAY_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Ray's own, which live as long as the cluster does.
RAY_ACTORS = {
    "ActorLocationTracker",
    "_AutoscalingCoordinatorActor",
    "_StatsActor",
    "_UsageCollectionActor",
}


@dataclass(frozen=True)
class Leftovers:
    """What is alive on the cluster, by class and by state, beside what Ray itself keeps there."""

    actors: tuple[str, ...]
    placement_groups: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.actors or self.placement_groups)


class Nodes:
    """A head and its workers. All of them end when `shutdown` is called, or with this process."""

    def __init__(self, **worker_options: Any) -> None:
        os.environ.update(RAY_SETTINGS)
        self._worker_options: dict[str, Any] = {
            "object_store_memory": WORKER_STORE_BYTES,
            **worker_options,
        }
        self._cluster = Cluster()
        self._add(num_cpus=0, object_store_memory=HEAD_STORE_BYTES, include_dashboard=False)
        self.replace_workers()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def workers(self) -> list[Node]:
        return sorted(self._cluster.worker_nodes, key=lambda node: raylet(node).pid)

    def replace_workers(self) -> None:
        """Starts workers until there are as many as there should be; those lost are buried."""
        reap_raylets()
        while len(self._cluster.worker_nodes) < WORKERS:
            self._add(num_cpus=NODE_CPUS, **self._worker_options)

    def _add(self, **options: Any) -> None:
        self._cluster.add_node(**options)
        signal.signal(signal.SIGTERM, _exit)  # Ray's own drains the node for 30 s

    def forget(self, node: Node) -> None:
        """A worker that was killed. What is left of it must end by itself."""
        self._cluster.worker_nodes.discard(node)

    @property
    def head(self) -> Node:
        assert self._cluster.head_node is not None
        return self._cluster.head_node

    def leftovers(self) -> Leftovers:
        """Asks the GCS itself: the suite is no driver of this cluster."""
        actors = self._cluster.global_state.actor_table(None).values()
        alive = (a["ActorClassName"] for a in actors if a["State"] != "DEAD")
        groups = self._cluster.global_state.placement_group_table().values()
        return Leftovers(
            tuple(sorted(name for name in alive if name not in RAY_ACTORS)),
            tuple(sorted(g["state"] for g in groups if g["state"] != "REMOVED")),
        )

    def shutdown(self, graceful: bool = True) -> None:
        """Not graceful where the GCS is dead: there is nobody to say good-bye to."""
        for node in [*self._cluster.worker_nodes, self.head]:
            node.kill_all_processes(check_alive=False, allow_graceful=graceful, wait=True)


def _exit(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def raylet(node: Node) -> psutil.Process:
    return _process(node, "raylet")


def gcs(node: Node) -> psutil.Process:
    return _process(node, "gcs_server")


def _process(node: Node, kind: str) -> psutil.Process:
    (info,) = node.all_processes[kind]
    return psutil.Process(info.process.pid)


def whole_node(node: Node) -> list[psutil.Process]:
    """Everything that runs on a node: what was started with it, and what that started."""
    pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
    found: list[psutil.Process] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):  # Ray may have buried it by now
            found += [psutil.Process(pid), *descendants(pid)]
    return found
