"""No room: at OUTPUT, in Ray's object store, and where that spills to.

A full disk is a real one: a tmpfs of a size that is too small, which takes root.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from chaos.faults import AGAIN, ITSELF, Fault
from chaos.job import Job, Run
from chaos.nodes import Nodes
from chaos.plan import Strike
from chaos.rounds import Commits, Kill, differences
from tests.running import comparable

LONGEST_RUN_SECONDS = 90.0
STORE_BYTES = 80 << 20
HOG_BYTES = 120 << 20
FULL_DISK = "disk full at OUTPUT"
FULL_STORE = "object store full"
FULL_SPILL = "object store full, and the disk that it spills to"
Say = Callable[[str], None]


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of its own; gives a function that changes its size."""
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tessera-chaos", str(folder)]
        subprocess.run(command, check=True)

    mount(f"size={num_bytes}")
    try:
        yield lambda size: mount(f"remount,size={size}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    return os.geteuid() == 0


def disk_full(job: Job, folder: Path, nodes: Nodes, whole: dict[str, bytes], say: Say) -> Kill:
    """Fails the shards for which there is no room, says so, and goes on when there is room."""
    with small_disk(folder / "small", sum(map(len, whole.values())) // 2) as resize:
        output = folder / "small" / "out"
        kill = _kill(FULL_DISK, AGAIN, f"{output.parent}, half of what OUTPUT needs")
        commits = Commits(output)
        run, status = _run(job, output, nodes, folder / "small-1.log")
        told = [line for line in run.said() if "No space left on device" in line]
        kill.exit_status, kill.said = status, told[-1][:300] if told else ""
        kill.seconds = kill.ended_after = run.seconds
        kill.phase = f"{commits.look()} committed"
        if status != 1 or not told:
            kill.problems.append(f"ended with {status}: {run.said()[-1:]}")
        _no_traceback(run, kill)
        say(f"      {FULL_DISK}: {status}, {kill.phase}, {kill.said}")
        resize(64 << 20)
        run, status = _run(job, output, nodes, folder / "small-2.log")
        kill.runs_after = 1
        if status != 0:
            kill.problems.append(f"with room it ended with {status}")
        _compare(kill, commits, comparable(output), whole)
        say(f"      with room: {status} {kill.problems or 'whole'}")
    return kill


def store_full(
    job: Job, folder: Path, whole: dict[str, bytes], spill_bytes: int | None, say: Say
) -> Kill:
    """Spills and goes on; where it cannot spill either, ends with the reason.

    Another job keeps the object store of every node full. Nodes of their own: `spill_bytes` is the
    size of the disk that they spill to (None: that of the machine).
    """
    spill = folder / ("spill" if spill_bytes is None else "small-spill")
    output = folder / f"out-{spill.name}"
    commits = Commits(output)
    store = (
        f"object store of {STORE_BYTES >> 20} MiB a node, {HOG_BYTES >> 20} MiB held by another job"
    )
    with ExitStack() as stack:
        if spill_bytes is None:
            spill.mkdir()
            kill = _kill(FULL_STORE, ITSELF, store)
        else:
            stack.enter_context(small_disk(spill, spill_bytes))
            kill = _kill(FULL_SPILL, AGAIN, f"{store}, {spill_bytes >> 20} MiB to spill to")
        spilled = _on_full_stores(job, output, spill, kill, folder)
    kill.phase = f"{commits.look()} committed, {spilled >> 20} MiB spilled at most"
    if not spilled:
        kill.problems.append("nothing was spilled: the store was not full")
    if kill.exit_status not in ((0,) if spill_bytes is None else (0, 1)):
        kill.problems.append(f"ended with {kill.exit_status}: {kill.said}")
    say(f"      {kill.strike.fault.name}: {kill.exit_status}, {kill.phase}, {kill.said}")
    if kill.exit_status != 0:
        nodes = Nodes()
        try:
            kill.runs_after = 1
            _, status = _run(job, output, nodes, folder / f"{output.name}-2.log")
        finally:
            nodes.shutdown()
        if status != 0:
            kill.problems.append(f"with room it ended with {status}")
    _compare(kill, commits, comparable(output), whole)
    say(f"      {kill.problems or 'whole'}")
    return kill


def _on_full_stores(job: Job, output: Path, spill: Path, kill: Kill, folder: Path) -> int:
    """Gives the largest number of bytes that lay spilled at once."""
    nodes = Nodes(object_store_memory=STORE_BYTES, object_spilling_directory=str(spill))
    largest = 0

    def watch() -> None:
        nonlocal largest
        largest = max(largest, sum(_size(file) for file in spill.rglob("*")))

    try:
        with subprocess.Popen(
            [sys.executable, "-m", "chaos.hog", str(HOG_BYTES)],
            env={**os.environ, "RAY_ADDRESS": nodes.address},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as hog:
            assert hog.stdout is not None
            if not any(line == b"full\n" for line in hog.stdout):  # Ray prints its errors there too
                kill.problems.append("the other job broke off")
            run, kill.exit_status = _run(job, output, nodes, folder / f"{output.name}.log", watch)
            hog.kill()
    finally:
        nodes.shutdown()
    kill.said = run.said()[-1][:300] if kill.exit_status and run.said() else ""
    kill.seconds = kill.ended_after = run.seconds
    _no_traceback(run, kill)
    return largest


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # taken back into the store meanwhile
        return 0


def _run(
    job: Job, output: Path, nodes: Nodes, errors: Path, watch: Callable[[], None] = lambda: None
) -> tuple[Run, int]:
    run = Run.start(job, output, nodes.address, errors)
    while run.process.poll() is None:
        watch()
        if run.seconds > LONGEST_RUN_SECONDS:
            run.process.kill()
        time.sleep(0.1)
    assert run.process.returncode is not None
    return run, run.process.returncode


def _kill(name: str, promised: str, victim: str) -> Kill:
    fault = Fault(name, lambda run, nodes, pick: None, promised, 0)
    return Kill(Strike(0, fault, False, 0.0, 0.0), victim, "", 0.0, time.monotonic())


def _no_traceback(run: Run, kill: Kill) -> None:
    if run.shows_traceback():
        kill.problems.append("the driver showed a traceback")


def _compare(
    kill: Kill, commits: Commits, found: dict[str, bytes], whole: dict[str, bytes]
) -> None:
    if changed := commits.changed():
        kill.problems.append(f"computed again: {', '.join(changed)}")
    if found != whole:
        kill.problems.append(f"OUTPUT differs: {differences(found, whole)}")
