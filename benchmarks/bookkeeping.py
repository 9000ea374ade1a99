"""What do a hundred thousand shards cost before the first of them is read?

python -m benchmarks.bookkeeping [--sizes 1000,10000,...] [--places local,s3] [--results FOLDER]

Makes an INPUT of N shards and an OUTPUT where all are committed, then runs the command itself:
`tessera extract` has nothing to do, and `tessera status` adds the commits up. The shards and the
embeddings are empty, the commits are real. S3 is Ceph's server on loopback; `--latency` puts a
proxy before it that holds each request back, as a distant store does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.dataset import SMALL_MODEL, write_small_model
from benchmarks.many_objects import make_files, put_objects
from benchmarks.record import REPOSITORY, RESULTS, Cell, Table, machine, write_result
from benchmarks.s3_server import s3_server
from jobs.config import ExtractConfig
from jobs.extract import describe
from model.checkpoint import open_checkpoint
from pipeline.commits import Commit, Source, StageSeconds, open_output
from pipeline.storage import Storage

SAMPLE_SECONDS = 0.05
BUCKET = "bookkeeping"
COLUMNS = ("place", "input", "shards", "seconds", "CPU seconds", "peak RSS, MiB", "requests")
ACCESS = re.compile(r'beast: .*"(GET|HEAD|PUT|DELETE|POST) (\S+)')


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of many shards before any is read.")
    parser.add_argument("--sizes", default="1000,10000,100000,230000", help="numbers of shards")
    parser.add_argument("--places", default="local,s3", help="local, s3 or both")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to a request")
    parser.add_argument("--status", action="store_true", help="time `tessera status` too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    about = machine()
    sizes = [int(size) for size in options.sizes.split(",")]
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as name:
        folder = Path(name)
        model = write_small_model(folder / "model", SMALL_MODEL)
        if "local" in options.places:
            rows += measure_local(folder, model, sizes, options.status)
        if "s3" in options.places:
            rows += measure_s3(folder, model, sizes, options.status, options.latency)
    table = Table("A run with nothing to do", COLUMNS, tuple(rows))
    notes = [
        "seconds and peak resident set of the whole command, its start included",
        f"added to each request of `s3, slow`: {options.latency:g} s",
    ]
    print(write_result("bookkeeping", "cpu", about, [table], notes, options.results))


def measure_local(
    folder: Path, model: Path, sizes: list[int], status: bool
) -> Iterator[tuple[Cell, ...]]:
    place = folder / "local"
    open_dataset(str(place / "out"), model, {})
    done = 0
    for size in sizes:
        for kind in KINDS:
            make_files(place, items(kind, range(done, size)))
        done = size
        yield from measure("local", str(place), size, model, {}, status)


def measure_s3(
    folder: Path, model: Path, sizes: list[int], status: bool, latency: float
) -> Iterator[tuple[Cell, ...]]:
    with s3_server(folder / "s3") as server, held_back(server.options, latency) as slow:
        Storage(server.options).open(f"s3://{BUCKET}/")[0].makedirs(BUCKET, exist_ok=True)
        open_dataset(f"s3://{BUCKET}/out", model, server.options)
        endpoint, key, secret = (server.options[k] for k in ("endpoint_url", "key", "secret"))
        done = 0
        for size in sizes:
            for kind in KINDS:
                put_objects(endpoint, key, secret, BUCKET, items(kind, range(done, size)))
            done = size
            url, log = f"s3://{BUCKET}", folder / "s3" / "client.rgw.log"
            yield from measure("s3", url, size, model, server.options, status, log)
            if latency:
                yield from measure("s3, slow", url, size, model, slow, False, log)


KINDS = ("in", "commits", "embeddings")


def items(kind: str, numbers: range) -> list[tuple[str, bytes]]:
    if kind == "in":
        return [(f"in/{n:06d}.tar", b"") for n in numbers]
    if kind == "embeddings":
        return [(f"out/embeddings/{n:06d}.parquet", b"") for n in numbers]
    return [(f"out/commits/{n:06d}.json", a_commit(f"{n:06d}").dump()) for n in numbers]


def a_commit(shard: str) -> Commit:
    return Commit(
        schema_version=1,
        fingerprint="f" * 64,
        shard=shard,
        source=Source(url=f"in/{shard}.tar", size=0, etag=None),
        samples=10_000,
        tiles=10_000,
        rejects=0,
        truncated_at=None,
        parts=(),
        rejects_part=None,
        computed=(),
        seconds=StageSeconds(read=1.0, tile=1.0, embed=1.0, write=1.0),
        committed_at="2026-11-24T00:00:00+00:00",
    )


def open_dataset(output: str, model: Path, options: dict[str, str]) -> None:
    config = ExtractConfig(input=("x",), output=output, model=str(model), dtype="float32")
    open_output(output, describe(config, open_checkpoint(str(model))), Storage(options))


def measure(
    place: str,
    url: str,
    size: int,
    model: Path,
    options: dict[str, str],
    status: bool,
    log: Path | None = None,
) -> Iterator[tuple[Cell, ...]]:
    extract = ["--model", str(model), "--dtype", "float32", "--json"]
    inputs = {"folder": f"{url}/in", "range": f"{url}/in/{{000000..{size - 1:06d}}}.tar"}
    for name, source in inputs.items():
        row = timed(["extract", source, f"{url}/out", *extract], options, log)
        yield (place, name, size, *row)
        print(place, name, size, row, file=sys.stderr, flush=True)
    if status:
        row = timed(["status", f"{url}/out", "--json"], options, log)
        yield (place, "`status`", size, *row)
        print(place, "status", size, row, file=sys.stderr, flush=True)


def timed(
    arguments: list[str], options: dict[str, str], log: Path | None
) -> tuple[float, float, int, str]:
    """Seconds, CPU seconds, peak RSS in MiB and S3 requests of one command."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    command += ["--storage-options", json.dumps(options)] if options else []
    before = log.stat().st_size if log is not None and log.exists() else 0
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    peak = 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(process.communicate)
        while not answer.done():
            peak = max(peak, peak_kib(process.pid))
            wait([answer], timeout=SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, answer.result()[0])
    found = json.loads(answer.result()[0])
    assert found.get("committed_before", found["committed"]) > 0
    assert not found.get("failures")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
    return round(seconds, 1), round(cpu, 1), round(peak / 1024), requests(log, before)


def peak_kib(pid: int) -> int:
    """Of the program itself; what `wait4` tells begins with the peak of who started it."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0  # a process that has ended has no memory


def requests(log: Path | None, before: int) -> str:
    """What Ceph's log tells from some place on."""
    if log is None or not log.exists():
        return ""
    with log.open() as lines:
        lines.seek(before)
        kinds = Counter(
            "LIST" if "list-type" in found[2] else found[1]
            for line in lines
            if (found := ACCESS.search(line))
        )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


@contextmanager
def held_back(options: dict[str, str], seconds: float) -> Iterator[dict[str, str]]:
    """Options of a proxy that forwards each request after a pause, and answers at once."""
    target = urlsplit(options["endpoint_url"])

    async def forward(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, pause: float
    ) -> None:
        while data := await source.read(1 << 16):
            await asyncio.sleep(pause)
            sink.write(data)
            await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(target.hostname, target.port)
        await asyncio.gather(forward(reader, there[1], seconds), forward(there[0], writer, 0.0))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = server.sockets[0].getsockname()[1]
    try:
        # Ceph checks signatures, which cover the name and port of the host that was asked.
        yield {**options, "endpoint_url": f"http://127.0.0.1:{port}"}
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


if __name__ == "__main__":
    main()
