"""One model split over processes of one machine: tensor-parallel ranks.

The process that makes a `ParallelEncoder` is rank 0; it starts the others. They start, work, fail
and end as one:

- a rank that dies, or that makes no progress for `hang_seconds`, ends all of them, rank 0 included:
  a rank that waits inside a collective can be helped in no other way;
- a rank that is stopped (SIGSTOP, a frozen process) shows it by a thread of its own that no longer
  counts: also while it loads, and between two calls;
- when rank 0 dies the kernel kills the others (PR_SET_PDEATHSIG); when it is stopped they kill it,
  later than it would have ended itself.

Tiles reach the ranks once, through memory they share. What a rank prints goes to rank 0's stderr
with the rank's number in front.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from model.attention import Choice
from model.checkpoint import Checkpoint, open_checkpoint
from model.child import job_of_child, start_child
from model.encoder import DType, EmbeddingDType, Encoder
from model.errors import UserError
from model.group import Group, distributed_group
from model.pulse import Pulse, SharedMemory, Stillness
from model.split import check_ranks

logger = logging.getLogger(__name__)

EXIT_RANKS_FAILED = 71
HANG_SECONDS = 120.0
LOAD_SECONDS = 1800.0  # 11 GB from a cold disk, and kernels compiled
GRACE_SECONDS = 10.0
LAST_WORDS_SECONDS = 2.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RankSettings:
    """What every rank must do alike. `folder` is the checkpoint's; `threads` are a rank's own."""

    size: int
    folder: str
    dtype: DType
    device: str
    layer: int
    features: Sequence[str]
    embedding_dtype: EmbeddingDType
    attention: str
    batch_tiles: int | None
    threads: int
    hang_seconds: float

    def load(self, rank: int, beat: Callable[[], None], store: int) -> Encoder:
        """Joins the other ranks, through the file with descriptor `store`, and loads its part."""
        group = _join(rank, self.size, self.device, beat, store)
        torch.set_num_threads(self.threads)
        return Encoder.load(
            open_checkpoint(self.folder),
            dtype=self.dtype,
            device=self.device,
            layer=self.layer,
            features=self.features,
            embedding_dtype=self.embedding_dtype,
            attention=self.attention,
            batch_tiles=self.batch_tiles,
            group=group,
        )


def _join(rank: int, size: int, device: str, beat: Callable[[], None], store: int) -> Group:
    # The ranks of a replica are on one machine; loopback is the one interface it surely has.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    torch.distributed.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        # A file in memory: no port that others could reach, nothing left behind on a disk.
        store=FileStore(f"/proc/self/fd/{store}", size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=LOAD_SECONDS),
        device_id=place if place.type == "cuda" else None,
    )
    return distributed_group(rank, size, place, beat)


class ParallelEncoder:
    """`Encoder`, split over `size` ranks of which this process is the first."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        size: int,
        *,
        dtype: DType,
        device: str,
        layer: int = -1,
        features: Sequence[str] = ("cls", "mean"),
        embedding_dtype: EmbeddingDType = "float32",
        attention: str = "auto",
        batch_tiles: int | None = None,
        threads: int = 1,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        """Starts the ranks and loads the model; `threads` of torch on a CPU are for each rank.

        When a rank has died or hangs, this process ends with EXIT_RANKS_FAILED. Raises UserError
        for what `Encoder.load` refuses.
        """
        check_ranks(checkpoint.config, size)
        settings = RankSettings(
            size=size,
            folder=str(checkpoint.folder),
            dtype=dtype,
            device=device,
            layer=layer,
            features=features,
            embedding_dtype=embedding_dtype,
            attention=attention,
            batch_tiles=batch_tiles,
            threads=threads,
            hang_seconds=hang_seconds,
        )
        self._hang_seconds = hang_seconds
        self._memory = SharedMemory(os.memfd_create("tessera-tiles"), size)
        store = os.memfd_create("tessera-store")  # never closed: torch's store opens it at its end
        self._pulse = Pulse(self._memory.beats)
        self._ranks = _Ranks(settings, self._memory, store, self._pulse)
        try:
            with self._pulse.busy(LOAD_SECONDS):
                self._ranks.start()
                self._encoder = settings.load(0, _beat(self._memory, 0), store)
                self._ranks.gather()
            self._ranks.loaded = True
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, UserError):
                # As in `encode`; while ranks load, their watcher waits before it ends them.
                self._ranks.join(2 * GRACE_SECONDS)
            self.close()
            raise

    def encode(self, tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """As `Encoder.encode`. Bad tiles are refused before another rank hears of them."""
        self._encoder.check(tiles)
        if not len(tiles):
            return self._encoder.encode(tiles)
        self._memory.tiles(tiles.shape)[...] = tiles
        with self._pulse.busy(self._hang_seconds):
            try:
                self._ranks.tell({"encode": tiles.shape})
                features = self._encoder.encode(tiles)
                self._ranks.gather()
            except Exception:
                # A collective breaks off when another rank has died: its watcher knows which.
                self._ranks.join(GRACE_SECONDS)
                raise
        return features

    @property
    def attention(self) -> Choice:
        return self._encoder.attention

    @property
    def batch_tiles(self) -> int:
        return self._encoder.batch_tiles

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, …"""
        return [process.pid for process in self._ranks.processes]

    def close(self) -> None:
        """Ends the other ranks."""
        self._ranks.close()
        # NCCL's group ends with the process: to destroy it waits for ranks that are dead now.
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()


def _beat(memory: SharedMemory, rank: int) -> Callable[[], None]:
    def beat() -> None:
        memory.beats[rank] += 1

    return beat


class _Ranks(threading.Thread):
    """Starts ranks 1..N-1, hears what they say, and watches over them.

    It is this thread that starts them: the kernel's death signal comes when the thread that started
    a process ends, and this one lives as long as its process.
    """

    def __init__(
        self,
        settings: RankSettings,
        memory: SharedMemory,
        store: int,
        pulse: Pulse,
    ) -> None:
        super().__init__(name="ranks", daemon=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._settings = settings
        self._memory = memory
        self._store = store
        self._pulse = pulse
        self.loaded = False
        self._started = threading.Event()
        self._closing = threading.Event()
        self._replies: queue.SimpleQueue[int] = queue.SimpleQueue()

    def start(self) -> None:
        super().start()
        self._started.wait()

    def tell(self, command: Mapping[str, Any]) -> None:
        line = json.dumps(command).encode() + b"\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    def gather(self) -> None:
        """Waits until each rank has said that it is done."""
        for _ in self.processes:
            self._replies.get()

    def close(self) -> None:
        self._closing.set()
        for process in self.processes:
            process.kill()
            process.wait()
        self.join()

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._watch(selector)
        except BaseException:
            logger.exception("tensor-parallel ranks: nobody watches over them any more; they end")
            self._end()
        finally:
            self._started.set()

    def _watch(self, selector: selectors.BaseSelector) -> None:
        for rank in range(1, self._settings.size):
            self._start_rank(rank, selector)
        self._started.set()
        stillness = Stillness(self._memory.rounds)
        try:
            while not self._closing.is_set():
                self._memory.rounds[0] += 1
                self._hear(selector)
                for rank, process in enumerate(self.processes, 1):
                    if process.poll() is not None:
                        self._fail(f"rank {rank} ended with status {process.returncode}", selector)
                        return
                if self._pulse.hung():
                    beats = ", ".join(map(str, self._memory.beats))
                    self._fail(f"no rank makes progress (collectives of each: {beats})", selector)
                    return
                if still := stillness.longer_than(self._settings.hang_seconds):
                    self._fail(f"rank {still[0]} has stopped", selector)
                    return
        finally:
            for key in selector.get_map().values():
                os.close(key.fd)

    def _hear(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(POLL_SECONDS):
            if not key.data():
                selector.unregister(key.fd)
                os.close(key.fd)

    def _start_rank(self, rank: int, selector: selectors.BaseSelector) -> None:
        reply_from, reply_to = os.pipe()
        print_from, print_to = os.pipe()
        job = {
            "rank": rank,
            "memory": self._memory.descriptor,
            "store": self._store,
            "reply": reply_to,
            "settings": asdict(self._settings),
        }
        process = start_child(
            "model.ranks",
            job,
            stdin=subprocess.PIPE,
            stdout=print_to,
            stderr=print_to,
            pass_fds=(reply_to, self._memory.descriptor, self._store),
            start_new_session=True,  # a Ctrl-C is for rank 0, which decides
        )
        os.close(reply_to)
        os.close(print_to)
        self.processes.append(process)
        unfinished = bytearray()

        def hear() -> bool:
            said = os.read(reply_from, 1)
            if said:
                self._replies.put(rank)
            return bool(said)

        def forward() -> bool:
            said = os.read(print_from, 1 << 16)
            *lines, rest = (unfinished + said).split(b"\n")
            unfinished[:] = rest
            for line in lines:
                print(f"rank {rank}: {line.decode(errors='replace')}", file=sys.stderr, flush=True)
            return bool(said)

        for descriptor, heard in ((reply_from, hear), (print_from, forward)):
            selector.register(descriptor, selectors.EVENT_READ, heard)

    def _fail(self, reason: str, selector: selectors.BaseSelector) -> None:
        # What one rank refuses while it loads, rank 0 refuses too, and says so better.
        if self._closing.wait(0.0 if self.loaded else GRACE_SECONDS):
            return
        logger.error("tensor-parallel ranks: %s; all of them end", reason)
        for process in self.processes:
            process.kill()
        until = time.monotonic() + LAST_WORDS_SECONDS
        while selector.get_map() and time.monotonic() < until:
            self._hear(selector)
        self._end()

    def _end(self) -> NoReturn:
        for process in self.processes:
            process.kill()
        logging.shutdown()
        os._exit(EXIT_RANKS_FAILED)


def main() -> None:
    """A rank other than the first. Ends when its stdin does."""
    job = job_of_child()
    rank, parent, settings = job["rank"], job["parent"], RankSettings(**job["settings"])
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    memory = SharedMemory(job["memory"], settings.size)
    pulse = Pulse(memory.beats)
    patience = 1.5 * settings.hang_seconds
    watching = (memory, rank, pulse, parent, patience)
    threading.Thread(target=_watch_parent, args=watching, daemon=True).start()
    encoder = settings.load(rank, _beat(memory, rank), job["store"])
    os.write(job["reply"], b".")
    for line in sys.stdin.buffer:
        shape = json.loads(line)["encode"]
        # Rank 0 is the first to give up; where it cannot, stopped as it is, this one ends it.
        with pulse.busy(patience):
            encoder.encode(memory.tiles(shape))
        os.write(job["reply"], b".")


def _watch_parent(
    memory: SharedMemory, rank: int, pulse: Pulse, parent: int, patience: float
) -> None:
    stillness = Stillness(memory.rounds)
    never = threading.Event()
    while not never.wait(POLL_SECONDS):
        memory.rounds[rank] += 1
        if pulse.hung() or 0 in stillness.longer_than(patience):
            print("rank 0 makes no progress and does not end itself; it is killed", flush=True)
            os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    main()
