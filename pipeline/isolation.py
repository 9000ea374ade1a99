"""Pictures decoded in a process of their own, which may crash or hang without harm.

Used for a group of pictures only after a worker died over it: this costs a copy of every picture
through a pipe. What comes back is the same to the byte; a picture that ends the process becomes a
reject. Headers are read under the hard time limit alone, as they are in the worker itself: chunks
must have the same boundaries at every attempt, and those follow from the headers.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from model.child import job_of_child, start_child
from pipeline.deadlines import deadline, hard_seconds, seconds_without_core
from pipeline.pictures import PictureError
from pipeline.tiling import TilePlan, Tiling, cut_tiles, picture_size, plan_tiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

CHILD = "pipeline.isolation"  # tests put one there whose decoder is broken
MAX_DEATHS = 3  # somebody else may have killed the child, so one is no proof
MAX_DECODE_BYTES = 6 << 30  # twice what the largest of the worst kind, a WebP, takes
START_SECONDS = 120.0


class ChildDiedError(Exception):
    """The child ended without an answer."""


class IsolationError(Exception):
    """No child can be started here: nothing that a picture could do."""


class IsolatedDecoder:
    """Does `picture_size` and `cut_tiles` in a child process, one picture at a time."""

    def __init__(self, tiling: Tiling, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._job = {"tiling": asdict(tiling), "deadline_seconds": deadline_seconds}
        self._child: subprocess.Popen[bytes] | None = None
        self._expired = False

    def picture_size(self, data: bytes) -> tuple[int, int]:
        """Raises PictureError, also with the codes `crashed`, `deadline` and `memory`."""
        answer, _ = self._ask({"do": "size"}, data)
        width, height = answer["size"]
        return width, height

    def cut_tiles(self, data: bytes, plan: TilePlan, out: NDArray[np.uint8]) -> None:
        """Raises PictureError, also with the codes `crashed`, `deadline` and `memory`."""
        _, tiles = self._ask({"do": "cut", "size": [plan.width, plan.height]}, data)
        out[...] = np.frombuffer(tiles, np.uint8).reshape(out.shape)

    def pause(self) -> None:
        """The child waits."""

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        limit = hard_seconds(self._deadline_seconds)
        for _ in range(MAX_DEATHS):
            if self._child is None:
                self._start()
            try:
                answer, payload = self._exchange(request, data, limit)
            except ChildDiedError as died:
                self.close()
                last = died
                if self._expired:
                    message = f"hung in the decoder for {limit:g} s"
                    raise PictureError("decode", "deadline", message) from died
                continue
            if "error" in answer:
                raise PictureError(*answer["error"])
            return answer, payload
        message = f"its decoder's process died {MAX_DEATHS} times ({last})"
        raise PictureError("decode", "crashed", message) from last

    def _start(self) -> None:
        try:
            self._child = start_child(
                CHILD,
                self._job,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C on a terminal is for the parent, which ends it
            )
            self._exchange(None, b"", START_SECONDS)  # says that it is ready
        except (OSError, ChildDiedError) as error:
            self.close()
            raise IsolationError(f"the decoder's process does not start: {error}") from error

    def _exchange(
        self, request: dict[str, Any] | None, data: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        self._expired = False
        answered = threading.Event()
        watch = threading.Thread(
            target=self._watch, args=(child.pid, seconds, answered), name="watch-decoder"
        )
        watch.start()
        try:
            if request is not None:
                send(child.stdin, request, data)
            answer = receive(child.stdout)
        except BrokenPipeError:
            answer = None
        finally:
            answered.set()
            watch.join()
        if answer is None:
            raise ChildDiedError(_how_it_ended(child))
        return answer

    def _watch(self, pid: int, seconds: float, answered: threading.Event) -> None:
        """Kills the child where it has not answered in so many seconds that it could have run."""
        began, waited = time.monotonic(), seconds_without_core(pid)
        rest = seconds
        while not answered.wait(rest):
            rest = seconds - (time.monotonic() - began) + seconds_without_core(pid) - waited
            if rest <= 0:
                self._expired = True
                os.kill(pid, signal.SIGKILL)  # not reaped before this thread has ended
                return


def send(sink: IO[bytes], head: dict[str, Any], payload: bytes) -> None:
    sink.write(json.dumps({**head, "num_bytes": len(payload)}).encode() + b"\n")
    sink.write(payload)
    sink.flush()


def receive(source: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """None at the end, also where it comes amid a message."""
    line = source.readline()
    if not line.endswith(b"\n"):
        return None
    head = json.loads(line)
    num_bytes = head.pop("num_bytes")
    payload = source.read(num_bytes)
    return (head, payload) if len(payload) == num_bytes else None


def _how_it_ended(child: subprocess.Popen[bytes]) -> str:
    status = child.wait()
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def main() -> None:
    """The child. Ends when its stdin does."""
    job = job_of_child()
    Path("/proc/self/oom_score_adj").write_text("1000")  # of all processes this one can be spared
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets between the answers
    tiling = Tiling(**job["tiling"])
    if tiling.resize == "fast":
        import simplejpeg  # noqa: F401 takes seconds, which are not the first picture's
        import torch  # noqa: F401
    send(sink, {"ready": True}, b"")
    while (message := receive(source)) is not None:
        send(sink, *_answer(*message, tiling, job["deadline_seconds"]))


def _answer(
    request: dict[str, Any], data: bytes, tiling: Tiling, deadline_seconds: float
) -> tuple[dict[str, Any], bytes]:
    try:
        if request["do"] == "size":
            return {"size": picture_size(data)}, b""
        width, height = request["size"]
        plan = plan_tiles(width, height, tiling)
        tiles = np.empty((plan.tile_count, tiling.tile_size, tiling.tile_size, 3), np.uint8)
        with _limited_memory(), deadline(deadline_seconds):
            cut_tiles(data, tiling, plan, tiles)
        return {}, tiles.tobytes()
    except PictureError as error:
        return {"error": [error.stage, error.code, error.message]}, b""
    except MemoryError:
        message = f"the decoder asked for more memory than {MAX_DECODE_BYTES >> 20} MiB"
        return {"error": ["decode", "memory", message]}, b""


@contextmanager
def _limited_memory() -> Iterator[None]:
    """What may be allocated in here; `RLIMIT_DATA` leaves out what libraries only map."""
    status = Path("/proc/self/status").read_text()
    used = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmData:")) << 10
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_DECODE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


if __name__ == "__main__":
    main()
