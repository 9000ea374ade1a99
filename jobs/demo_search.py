"""The end of the demo: an index of what came out, in which a picture finds itself, turned and
recompressed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jobs.index import build_index
from jobs.search import Query, distance, search
from pipeline.vector_index import Neighbor

# The model is random: it tells apart what differs much in colour. This photograph is far enough
# from all others, some of which are other encodings of each other, that nothing hangs on luck.
STEM = "astronaut"
KEY = f"0000-{STEM}"
QUALITY = 50


@dataclass(frozen=True)
class Found:
    """The turned picture's file, its nearest pictures in the index, and whether it is the first."""

    image: Path
    index: Path
    neighbors: Sequence[Neighbor]

    @property
    def is_itself(self) -> bool:
        return self.neighbors[0].key == KEY

    def __str__(self) -> str:
        first, second = self.neighbors
        whom = "itself" if self.is_itself else first.key
        return (
            f"search: {STEM}, turned and recompressed, finds {whom} first (distance "
            f"{distance(first):.4f}), then {second.key} ({distance(second):.4f})"
        )


def find_itself(folder: Path, output: Path, picture: bytes) -> Found:
    """Indexes OUTPUT in `folder`, and looks there for a picture turned by a quarter."""
    index, image = folder / "index", folder / f"{STEM}-turned.jpg"
    build_index(str(output), str(index))
    with Image.open(io.BytesIO(picture)) as upright:
        turned = upright.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    turned.save(image, "JPEG", quality=QUALITY)
    return Found(image, index, search(str(index), Query(image=image), 2))
