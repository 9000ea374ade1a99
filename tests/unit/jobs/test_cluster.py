"""Where replicas go: decided from what the nodes have, before any of them starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster import cause, connect, plan_pool, tell_of_lost_head, tell_of_lost_raylet
from jobs.terminal import BrokenRunError
from model.errors import UserError


@pytest.fixture
def gpu_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of 4 and 2 GPUs, a dead one of 8, and a head without any."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 32.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 104.0, "GPU": 6.0})


@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(1, 6), (2, 3), (3, 1), (4, 1)])
def test_a_replica_lies_on_one_node(gpu_nodes: None, tensor_parallel: int, replicas: int) -> None:
    pool = plan_pool(tensor_parallel, None, "bfloat16", started_here=False)
    assert pool.device == "cuda"
    assert pool.replicas == (replicas, replicas)


@pytest.mark.parametrize(
    ("tensor_parallel", "replicas", "says"),
    [
        (5, None, "tensor_parallel 5: no node has that many GPUs .the largest has 4.; use 4"),
        (2, (4, 4), "replicas 4: the cluster's GPUs hold 3; ask for no more than that"),
    ],
)
def test_what_no_node_holds_is_refused(
    gpu_nodes: None, tensor_parallel: int, replicas: tuple[int, int] | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan_pool(tensor_parallel, replicas, "bfloat16", started_here=False)


def test_fp8_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 16.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0})
    with pytest.raises(UserError, match="dtype fp8: the cluster has no GPUs"):
        plan_pool(1, None, "fp8", started_here=False)
    with pytest.raises(UserError, match=r"tensor_parallel 17: .* its largest node has 16 CPUs"):
        plan_pool(17, None, "bfloat16", started_here=False)
    assert plan_pool(16, None, "bfloat16", started_here=False).device == "cpu"


def test_a_head_that_is_lost_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray ends a driver without a word then."""
    monkeypatch.setattr("jobs.cluster.HEAD_LOOK_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        looks = iter([True] * 5 + [False])
        monkeypatch.setattr("ray.is_initialized", lambda: next(looks))
        tell_of_lost_head(f"127.0.0.1:{port}")
        assert capsys.readouterr().err == ""
    looks = iter([True] * 7 + [False])
    tell_of_lost_head(f"127.0.0.1:{port}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"tessera: the head of the Ray cluster (127.0.0.1:{port}) does not answer"
    )


def test_a_cluster_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says so with a bare Exception, after 30 s of its own."""

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This\n\ncould happen.")

    monkeypatch.setattr("ray.init", init)
    for name in ("keep_session_private", "keep_token_private"):
        monkeypatch.setattr(f"jobs.cluster.{name}", lambda *_, **__: None)
    monkeypatch.setattr("os.environ", {})
    with pytest.raises(BrokenRunError, match=r"^Ray did not start on this machine: ") as told:
        connect()
    assert "\n" not in str(told.value)


LISTEN = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("dies", [True, False])
def test_a_raylet_that_is_lost_is_told(
    dies: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("jobs.cluster.RAYLET_LOOK_SECONDS", 0.01)
    path = str(tmp_path / "raylet")
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as raylet:
        assert raylet.stdout is not None
        assert raylet.stdout.readline() == b"up\n"
        looks = iter([True] * 5)

        def is_initialized() -> bool:
            if dies:
                raylet.kill()
                return True
            return next(looks, False)

        monkeypatch.setattr("ray.is_initialized", is_initialized)
        tell_of_lost_raylet(path)
        raylet.kill()
    said = capsys.readouterr().err
    assert said.startswith("tessera: Ray's process on this node (the raylet) is gone") == dies
    assert said.count("\n") == dies


def test_a_broken_run_names_what_was_raised() -> None:
    """As Ray 2.60 words it: the cause, then its own account and advice."""
    text = """\x1b[36mray::MapWorker(MapBatches(Replica)).submit()\x1b[39m (pid=2752, ip=192.0.2.2)
  File "/x/pipeline/replica.py", line 115, in __call__
    deaths = ray.get(self._deaths.begin.remote(chunk_id))
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: Deaths
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR

The above exception was the direct cause of the following exception:

\x1b[36mray::MapWorker(MapBatches(Replica)).submit()\x1b[39m (pid=2752, ip=192.0.2.2)
ray.exceptions.UserCodeException: UDF failed to process a data block.
To change retry attempts, configure `ray.data.DataContext.get_current()`."""
    assert cause(RuntimeError(text)) == (
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task"
    )
    assert cause(RuntimeError("part a 000000-000001 came twice")) == (
        "part a 000000-000001 came twice"
    )
    assert cause(RuntimeError()) == "RuntimeError"
