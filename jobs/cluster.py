"""The Ray cluster a job runs on: found or started, and whether it can hold what was asked."""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
from ray._private import auto_init_hook
from ray.exceptions import AuthenticationError, RayError

from jobs.local_ray import (
    keep_session_private,
    keep_token_private,
    on_loopback,
    warn_without_authentication,
)
from jobs.terminal import BrokenRunError, divert_native_stderr
from model.errors import UserError
from pipeline.cpus import usable_cpus
from pipeline.lease import LeaseLostError
from pipeline.ledger import LedgerError

# Logical CPUs of a local cluster beyond its cores: reading, writing and the replica mostly wait,
# and Ray ends idle workers above this number after a second, only to start them again.
LOCAL_EXTRA_CPUS = 6
# Tiles that travel together. The driver spends 6–12 ms a chunk, so GPUs want large ones;
# a CPU embeds a few dozen tiles a second, and small ones keep it busy sooner and take less memory.
GPU_CHUNK_TILES = 128
CPU_CHUNK_TILES = 32
CPU_BUFFER_BYTES = 256 << 20  # about thirteen chunks between the stages

START_SECONDS = 120  # for the GCS of a local cluster to answer; Ray would wait 30
HEAD_LOOK_SECONDS = 2.0
HEAD_MISSES = 2
RAYLET_LOOK_SECONDS = 1.0  # until `ray.shutdown()` is noticed; a death is at once

RAISED = re.compile(r"[\w.]+(Error|Exception): ")  # the last line of a traceback
WRAPPED = "ray.exceptions.UserCodeException: "


@dataclass(frozen=True)
class Pool:
    """Where the replicas run: device, smallest and largest number, and what flows beside them.

    `chunk_tiles` is a function of the device alone: the same device gives the same chunks.
    """

    device: Literal["cpu", "cuda"]
    replicas: tuple[int, int]
    num_io_tasks: int
    num_tile_tasks: int | None
    chunk_tiles: int
    buffer_bytes: int | None


def connect(local: bool = False) -> bool:
    """Connects to the cluster `RAY_ADDRESS` names (`auto`: one on this machine), or starts one.

    Without `RAY_ADDRESS` no cluster is looked for: what is found on a machine may be another
    user's, to whom this one's token and credentials would go, or another job's, and end with it.

    Gives whether it started one. stderr's descriptor 2 goes to a log file from here on.

    Raises:
        UserError: nothing answers at `RAY_ADDRESS`, or it wants another token.
        BrokenRunError: a cluster could not be started.
    """
    # A call that comes after the end of the cluster would start another one.
    auto_init_hook.enable_auto_connect = False
    # Their lines are about Ray's insides; what a user must know comes as an exception.
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # A job of one shard makes it warn that its stages may run more tasks than that.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data\.")
    address = os.environ.get("RAY_ADDRESS") or "local"
    start_here = local or address == "local"
    warn_without_authentication()
    keep_token_private(create=start_here)
    if start_here:
        _start_local()
    else:
        _join(address)
    divert_native_stderr(log_folder() / "tessera-driver.err")
    head = ray.get_runtime_context().gcs_address
    threading.Thread(target=tell_of_lost_head, args=(head,), name="head", daemon=True).start()
    if sys.platform == "linux":
        raylet = ray._private.worker._global_node.raylet_socket_name
        watch = threading.Thread(target=tell_of_lost_raylet, args=(raylet,), daemon=True)
        watch.start()
    return start_here


def _start_local() -> None:
    keep_session_private()
    # Threads of a CPU replica that wait by spinning take the cores from the tiling tasks.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_worker_niceness", "0")  # or the replica is as nice as tiling
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(START_SECONDS))
    try:
        with on_loopback():
            ray.init(
                address="local",
                num_cpus=usable_cpus() + LOCAL_EXTRA_CPUS,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # plain ones: "The current node timed out during startup…"
        raise BrokenRunError(f"Ray did not start on this machine: {cause(error)}") from error


def _join(address: str) -> None:
    try:
        ray.init(address="auto", logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise UserError(
            f"RAY_ADDRESS {address}: the cluster refuses this user's token; give its own in "
            "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        ) from error
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"RAY_ADDRESS {address}: no cluster answers ({reason})") from error


def tell_of_lost_head(address: str) -> None:
    """Says that the head does not answer: Ray's native code will end this process without a word.

    It does so after `gcs_rpc_server_reconnect_timeout_s` (60 s), with exit status 1.
    """
    host, _, port = address.rpartition(":")
    missed, never = 0, threading.Event()
    while ray.is_initialized():
        never.wait(HEAD_LOOK_SECONDS)
        try:
            socket.create_connection((host.strip("[]"), int(port)), HEAD_LOOK_SECONDS).close()
            missed = 0
        except OSError:
            missed += 1
        if missed == HEAD_MISSES and ray.is_initialized():
            print(
                f"tessera: the head of the Ray cluster ({address}) does not answer; unless it is "
                "back within a minute this run ends. What is committed stays: start the cluster "
                "again and run this again",
                file=sys.stderr,
                flush=True,
            )


def tell_of_lost_raylet(path: str) -> None:
    """Says that this node's raylet, which listens at `path`, is dead: Ray's native code ends this
    process a moment later, with exit status 1 and without a word.
    """
    with suppress(OSError):  # it is dead already
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        descriptor = os.pidfd_open(struct.unpack("3i", peer)[0])
        try:
            while ray.is_initialized():
                if select.select([descriptor], [], [], RAYLET_LOOK_SECONDS)[0]:
                    break
        finally:
            os.close(descriptor)
    if ray.is_initialized():
        print(
            "tessera: Ray's process on this node (the raylet) is gone, and this run ends with it. "
            "What is committed stays: start Ray on this node again and run this again",
            file=sys.stderr,
            flush=True,
        )


def log_folder() -> Path:
    """Where Ray keeps the logs of this session, on this machine."""
    return Path(ray._private.worker._global_node.get_logs_dir_path())


@contextmanager
def lost_leases_explained() -> Iterator[None]:
    """Turns the loss of OUTPUT to another run into one line."""
    try:
        yield
    except LeaseLostError as error:
        raise BrokenRunError(
            f"the run stops: {error}; what is committed stays, and that run goes on"
        ) from error


@contextmanager
def broken_runs_explained() -> Iterator[None]:
    """Turns what Ray raises into one line. The line ends with the cause, not with Ray's account."""
    try:
        with lost_leases_explained():
            yield
    except (RayError, LedgerError, OSError) as error:
        raise BrokenRunError(
            f"the run broke off: {cause(error)}; what is committed stays, run it again to go on; "
            f"Ray's logs: {log_folder()}"
        ) from error


def cause(error: Exception) -> str:
    """What was raised, on one line: without what Ray Data says about it behind it."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if RAISED.match(line) and WRAPPED not in line]
    return [type(error).__name__, *lines[-1:], *raised[-1:]][-1].strip().rstrip(".")


def plan_pool(
    tensor_parallel: int, replicas: tuple[int, int] | None, dtype: str, started_here: bool
) -> Pool:
    """Decides where replicas go, before any of them starts.

    `started_here` says that `connect` made the cluster, whose CPUs are more than the cores.

    Raises:
        UserError: the cluster cannot hold what was asked.
    """
    gpus = [int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"]]
    cpus = ray.cluster_resources().get("CPU", 0)
    num_io_tasks = max(2, min(64, int(cpus) // 4))
    num_tile_tasks = usable_cpus() if started_here else None
    if not any(gpus):
        if dtype == "fp8":
            raise UserError("dtype fp8: the cluster has no GPUs; use bfloat16 or float32")
        cores = max(int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"])
        if started_here:
            cores = usable_cpus()
        if tensor_parallel > cores:
            raise UserError(
                f"tensor_parallel {tensor_parallel}: the cluster has no GPUs, and its largest node "
                f"has {cores} CPUs; use {cores} or less, or add nodes with GPUs"
            )
        return Pool(
            "cpu",
            replicas or (1, 1),
            num_io_tasks,
            num_tile_tasks,
            CPU_CHUNK_TILES,
            CPU_BUFFER_BYTES,
        )
    room = sum(count // tensor_parallel for count in gpus)
    if not room:
        raise UserError(
            f"tensor_parallel {tensor_parallel}: no node has that many GPUs (the largest has "
            f"{max(gpus)}); use {max(gpus)} or less"
        )
    if replicas is not None and replicas[0] > room:
        raise UserError(
            f"replicas {replicas[0]}: the cluster's GPUs hold {room}; ask for no more than that"
        )
    return Pool(
        "cuda", replicas or (room, room), num_io_tasks, num_tile_tasks, GPU_CHUNK_TILES, None
    )
