"""The kinds of faults: whom they strike, how, and what is promised then."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from chaos.job import Run
from chaos.nodes import Nodes, gcs, raylet, whole_node
from chaos.processes import at_work, kill_all, kill_at_work, title

PAUSE_SECONDS = 16.0  # more than half a lease: the run must look whether OUTPUT is still its own
REPLICA = "ray::MapWorker(MapBatches(Replica))"
# What a user is promised, by who has to act.
ITSELF = "the same run goes on and ends with 0"
AGAIN = "run the same command again: what is committed stays, the rest is computed"


@dataclass(frozen=True)
class Fault:
    """`strike` gives the victim in words, or None where there is none at that moment.

    `ends_run`: the job must be run again; `ends_cluster`: Ray must be started again too.
    `slow`: nothing happens until somebody's patience ends; no other strike before the next commit.
    `early`: this work is over when a run's first shard is committed. `ranks` is the tensor_parallel
    of the job that it is tried on.
    """

    name: str
    strike: Callable[[Run, Nodes, float], str | None]
    promised: str
    weight: int
    ends_run: bool = False
    ends_cluster: bool = False
    slow: bool = False
    early: bool = False
    ranks: int = 1

    @property
    def place(self) -> int:
        """Its place among the others."""
        return FAULTS.index(self) if self in FAULTS else len(FAULTS)


def _worker(words: str) -> Callable[[Run, Nodes, float], str | None]:
    """SIGKILL to a process that does this work now."""

    def strike(run: Run, nodes: Nodes, pick: float) -> str | None:
        pids = at_work(words)
        if not pids:
            return None
        pid = pids[int(pick * len(pids))]
        said = kill_at_work(pid, words)
        return said and f"{pid} {said[said.index(words) :][:60]}"

    return strike


def _driver(run: Run, nodes: Nodes, pick: float) -> str | None:
    run.process.kill()
    dead = run.process.wait() == -signal.SIGKILL  # else it had ended by itself, just before
    return f"{run.process.pid} tessera extract" if dead else None


def _driver_paused(run: Run, nodes: Nodes, pick: float) -> str | None:
    """Stopped for a while, as by a suspended virtual machine; then it goes on."""
    if run.process.poll() is not None:
        return None
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    run.process.send_signal(signal.SIGCONT)
    return f"{run.process.pid} tessera extract"


def _rank_stopped(run: Run, nodes: Nodes, pick: float) -> str | None:
    if not at_work(f"{REPLICA}.submit"):
        return None  # a rank that hangs while the model is loaded has half an hour (LOAD_SECONDS)
    for pid in at_work("model.ranks"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            return f"{pid} model.ranks"
    return None


def _raylet(run: Run, nodes: Nodes, pick: float) -> str:
    node = _pick(nodes, pick)
    victim = raylet(node)
    kill_all([victim])
    nodes.forget(node)
    return f"{victim.pid} raylet"


def _drivers_raylet(run: Run, nodes: Nodes, pick: float) -> str:
    victim = raylet(nodes.head)
    kill_all([victim])
    return f"{victim.pid} raylet"


def _node(run: Run, nodes: Nodes, pick: float) -> str:
    node = _pick(nodes, pick)
    victims = whole_node(node)
    held = any(REPLICA in title(victim.pid) for victim in victims)
    kill_all(victims)
    nodes.forget(node)
    return f"{len(victims)} processes, {'with' if held else 'without'} a replica"


def _gcs(run: Run, nodes: Nodes, pick: float) -> str:
    victim = gcs(nodes.head)
    kill_all([victim])
    return f"{victim.pid} gcs_server"


def _head(run: Run, nodes: Nodes, pick: float) -> str:
    victims = whole_node(nodes.head)
    kill_all(victims)
    return f"{len(victims)} processes"


def _pick(nodes: Nodes, pick: float) -> Any:
    workers = nodes.workers()
    return workers[int(pick * len(workers))]


FAULTS = (
    Fault("SIGKILL of the driver", _driver, AGAIN, 14, ends_run=True),
    Fault(
        "SIGKILL of a read worker", _worker("ray::MapBatches(read_stage)"), ITSELF, 8, early=True
    ),
    Fault(
        "SIGKILL of a tile worker", _worker("ray::MapBatches(tile_stage)"), ITSELF, 12, early=True
    ),
    Fault("SIGKILL of a replica", _worker(f"{REPLICA}.submit"), ITSELF, 12),
    Fault("SIGKILL of a write worker", _worker("ray::MapBatches(write_stage)"), ITSELF, 8),
    Fault("SIGKILL of a finalize task", _worker("ray::finalize_stage"), ITSELF, 8),
    Fault("SIGKILL of a worker node's raylet", _raylet, ITSELF, 7),
    Fault("loss of a worker node, all its processes at once", _node, ITSELF, 9),
    Fault("SIGKILL of the GCS", _gcs, AGAIN, 3, ends_run=True, ends_cluster=True),
    Fault(
        "SIGKILL of the raylet of the driver's node",
        _drivers_raylet,
        AGAIN,
        2,
        ends_run=True,
        ends_cluster=True,
    ),
    Fault("loss of the head node", _head, AGAIN, 3, ends_run=True, ends_cluster=True),
    Fault("SIGKILL of the actor that counts deaths", _worker("ray::Deaths"), ITSELF, 4),
    Fault("SIGSTOP of the driver for 16 s", _driver_paused, ITSELF, 2),
    Fault("SIGKILL of a rank (tensor_parallel 2)", _worker("model.ranks"), ITSELF, 6, ranks=2),
    Fault(
        "SIGKILL of rank 0 (tensor_parallel 2)", _worker(f"{REPLICA}.submit"), ITSELF, 5, ranks=2
    ),
    Fault("SIGSTOP of a rank (tensor_parallel 2)", _rank_stopped, ITSELF, 3, slow=True, ranks=2),
)

# Those of `make test`.
SHORT = (
    "SIGKILL of the driver",
    "SIGKILL of a tile worker",
    "SIGKILL of a replica",
    "loss of a worker node, all its processes at once",
)
