"""`tessera demo`: the main job on real pictures, on this machine, without network or GPU."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from jobs.config import ExtractConfig, tiling_of
from jobs.contact_sheet import draw_contact_sheet
from jobs.demo_search import STEM, Found, find_itself
from jobs.extract import Summary, extract
from jobs.search import to_json
from model.config import ViTConfig
from model.random_checkpoint import write_random_checkpoint

# The 6B's shape made small: 448 pixels, 1025 tokens and q/k norm as there, far less work.
DEMO_MODEL = ViTConfig(
    hidden_size=160,
    num_layers=3,
    num_heads=5,
    intermediate_size=640,
    image_size=448,
    patch_size=14,
    norm="rms_norm",
    qk_norm=True,
    qkv_bias=False,
)
OPEN_RESULT = """\
import pyarrow.dataset as pds
rows = pds.dataset("{folder}").to_table(columns=["key", "tile_index", "tile_count", "cls"])
print(rows.to_pandas().head())"""


@dataclass(frozen=True)
class Picture:
    """One picture of the demo as it stands in a shard."""

    key: str
    extension: str
    data: bytes
    caption: str


def run_demo(folder: Path, as_json: bool) -> int:
    """Makes shards and a checkpoint, extracts, searches, and shows what came out.

    Gives the exit status: 0 only if a picture has found itself.
    """
    console = Console(stderr=as_json)
    sources, checkpoint, output = folder / "shards", folder / "checkpoint", folder / "output"
    for made, record in ((output, "dataset.json"), (folder / "index", "index.json")):
        if (made / record).exists():
            shutil.rmtree(made)  # an earlier demo's: the demo shows the whole way each time
    shards = make_shards(sources)
    write_random_checkpoint(checkpoint, DEMO_MODEL, seed=0)
    console.print(
        f"made {len(shards)} shards of {sum(map(len, shards.values()))} pictures in {sources} "
        f"and a random checkpoint in {checkpoint}",
        highlight=False,
    )
    options = yaml.safe_load(files("jobs.configs").joinpath("local-demo.yaml").read_text())
    config = ExtractConfig.model_validate(
        {**options, "input": [str(sources)], "output": str(output), "model": str(checkpoint)}
    )
    summary = extract(config, local_cluster=True)
    sheet = folder / "contact-sheet.png"
    tiling = tiling_of(config, DEMO_MODEL.image_size, DEMO_MODEL.image_size)
    shown = [picture for pictures in shards.values() for picture in pictures]
    draw_contact_sheet([(p.key, p.data) for p in shown], tiling, sheet)
    found = None
    if not summary.exit_status:
        (picture,) = (p.data for p in shards["as-shipped"] if p.key == STEM)
        found = find_itself(folder, output, picture)
    if as_json:
        neighbors = [] if found is None else [to_json(neighbor) for neighbor in found.neighbors]
        extras = {"contact_sheet": str(sheet), "neighbors": neighbors}
        print(json.dumps({**summary.to_json(), **extras}, indent=1))
    else:
        show(console, summary, output, sheet)
        if found is not None:
            show_found(console, found)
    return summary.exit_status or int(found is None or not found.is_itself)


def show(console: Console, summary: Summary, output: Path, sheet: Path) -> None:
    caption = f"in {summary.seconds:.1f} s, start of Ray included"
    names = ("shards", "pictures", "tiles", "rejects", "tiles/s")
    table = Table(*names, title="what came out", caption=caption)
    table.add_row(
        f"{summary.committed} of {summary.shards}",
        str(summary.samples),
        str(summary.tiles),
        str(sum(summary.rejects.values())),
        f"{summary.tiles / summary.seconds:.1f}",
    )
    console.print(table)
    if summary.rejects:
        rejects = pds.dataset(output / "rejects").to_table().to_pylist()
        for reject in rejects:
            console.print(
                f"reject: {reject['member']}: {reject['stage']}/{reject['error']}: "
                f"{reject['message']}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    console.print(f"\nhow the pictures were tiled: {sheet}", markup=False, soft_wrap=True)
    console.print("\nopen the result in Python:\n", highlight=False)
    console.print(
        OPEN_RESULT.format(folder=output / "embeddings"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show_found(console: Console, found: Found) -> None:
    console.print(f"\n{found}", markup=False, highlight=False, soft_wrap=True)
    line = f"look around: tessera browse {found.index}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def make_shards(folder: Path) -> dict[str, list[Picture]]:
    """Writes three small tars of the shipped photographs; the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = _shipped()
    shards = {
        "as-shipped": [Picture(p.key, p.extension, p.data, p.caption) for p in photographs],
        "encodings": _encodings(photographs),
        "sizes": _sizes(photographs),
    }
    for name, pictures in shards.items():
        _write_tar(folder / f"{name}.tar", pictures)
    return shards


def _shipped() -> list[Picture]:
    pictures = []
    for entry in sorted(files("jobs.pictures").iterdir(), key=lambda e: e.name):
        stem, _, extension = entry.name.rpartition(".")
        if extension in ("jpg", "png", "webp"):
            data = entry.read_bytes()
            pictures.append(Picture(stem, extension, data, stem.replace("_", " ")))
    return pictures


def _encodings(photographs: Sequence[Picture]) -> list[Picture]:
    """The same photographs as grey, CMYK and progressive JPEG, PNG, WebP; one is cut short."""
    ways: list[tuple[str, str, str, dict[str, Any]]] = [
        ("grey", "jpg", "L", {}),
        ("progressive", "jpg", "RGB", {"progressive": True}),
        ("cmyk", "jpg", "CMYK", {}),
        ("palette", "png", "P", {}),
        ("alpha", "png", "RGBA", {}),
        ("lossy", "webp", "RGB", {"quality": 80}),
    ]
    pictures = []
    for photograph, (way, extension, mode, options) in zip(photographs, ways, strict=False):
        image = _open(photograph)
        image.thumbnail((480, 480))
        data = _encode(image.convert(mode), extension, **options)
        pictures.append(Picture(f"{photograph.key}-{way}", extension, data, photograph.caption))
    broken = photographs[len(ways)]
    half = broken.data[: len(broken.data) // 2]
    pictures.append(Picture(f"{broken.key}-cut-short", broken.extension, half, broken.caption))
    return pictures


def _sizes(photographs: Sequence[Picture]) -> list[Picture]:
    """From a thumbnail to a strip: what dynamic tiling makes of it is on the contact sheet."""
    sizes = [(64, 64), (300, 200), (448, 448), (900, 300), (250, 750), (1000, 750), (1300, 120)]
    pictures = []
    for photograph, (width, height) in zip(reversed(photographs), sizes, strict=False):
        image = _open(photograph).convert("RGB").resize((width, height))
        key = f"{photograph.key}-{width}x{height}"
        pictures.append(Picture(key, "jpg", _encode(image, "jpg"), photograph.caption))
    return pictures


def _open(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture.data))


def _encode(image: Image.Image, extension: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
    return sink.getvalue()


def _write_tar(path: Path, pictures: Sequence[Picture]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, picture in enumerate(pictures):
            key = f"{number:04d}-{picture.key}"
            document = {"caption": picture.caption, "license": "see jobs/pictures/README.md"}
            for extension, data in (
                (picture.extension, picture.data),
                ("txt", picture.caption.encode()),
                ("json", json.dumps(document).encode()),
            ):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
