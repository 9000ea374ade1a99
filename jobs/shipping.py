"""What travels to a cluster with a job: the code of this installation, and the files it names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jobs
import model
import pipeline

PACKAGES = (model, pipeline, jobs)
# The demo's pictures stay here: a job on a cluster never shows them.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "pictures")


def pack(folder: Path, files: Mapping[str, bytes]) -> None:
    """Lays out the working directory of a job.

    Nothing but the three packages and `files` (name -> content) goes into it: no tests, no
    environment, nothing of the folder the command was called in. The same code and files give the
    same bytes, and Ray sends them once.
    """
    for package in PACKAGES:
        assert package.__file__ is not None
        source = Path(package.__file__).parent
        shutil.copytree(source, folder / source.name, ignore=LEFT_OUT)
    # A run records the version that made it, also where the nodes have another one installed.
    about = folder / f"tessera-{version('tessera')}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tessera\nVersion: {version('tessera')}\n"
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
