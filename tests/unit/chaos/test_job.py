"""Whose traceback it is: the driver's own, or one of Ray's that cannot spill."""

from __future__ import annotations

import subprocess
from pathlib import Path

from chaos.__main__ import left_in
from chaos.job import Run

SPILLING = """\
\x1b[33m(raylet)\x1b[0m Traceback (most recent call last):
  File "/x/site-packages/ray/_private/external_storage.py", line 347, in spill_objects
    return self._write_multiple_objects(f, object_refs, owner_addresses, url)
OSError: [Errno 28] No space left on device

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "python/ray/_raylet.pyx", line 2888, in ray._raylet.spill_objects_handler
  File "/x/site-packages/ray/_private/external_storage.py", line 640, in spill_objects
    return _external_storage.spill_objects(object_refs, owner_addresses)
OSError: [Errno 28] No space left on device
"""
OWN = """\
Traceback (most recent call last):
  File "/x/jobs/cli.py", line 3, in main
    app()
  File "/x/site-packages/ray/_private/external_storage.py", line 640, in spill_objects
KeyError: 'a'
"""
BROKEN = "tessera: the run broke off: Local disk is full\n"


def shows_traceback(folder: Path, text: str) -> bool:
    errors = folder / "errors.log"
    errors.write_text(text)
    with subprocess.Popen(["true"]) as process:
        return Run(process, errors).shows_traceback()


def test_ray_that_cannot_spill_is_not_the_driver(tmp_path: Path) -> None:
    assert not shows_traceback(tmp_path, SPILLING + BROKEN)
    assert shows_traceback(tmp_path, SPILLING + OWN)
    assert shows_traceback(tmp_path, OWN + SPILLING)


def test_a_traceback_without_frames_is_the_drivers(tmp_path: Path) -> None:
    assert shows_traceback(tmp_path, "Traceback (most recent call last):\nRecursionError\n")


def test_what_python_leaves_of_its_look_at_a_folder_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / "5lnwdb8v").write_bytes(b"blat")
    (tmp_path / "5lnwdb8w").write_bytes(b"tiles")
    (tmp_path / "tmp_x1").write_bytes(b"")
    (tmp_path / "ray").mkdir()
    assert left_in(tmp_path) == ["5lnwdb8w", "tmp_x1"]
