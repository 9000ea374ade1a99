"""The script one would write without tessera: webdataset, a DataLoader, transformers, Parquet.

python -m benchmarks.baseline_script SHARDS_FOLDER OUTPUT.parquet CHECKPOINT
"""

# mypy: ignore-errors

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from transformers import InternVLVisionModel

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SIDE, MAX_TILES, BATCH_TILES = 448, 12, 4


def resize(image, width, height):  # width first: Pillow 13 changed the order, and up to 5 of 255
    return image.resize((width, image.height)).resize((width, height))


def dynamic_preprocess(image):  # InternVL's model card: closest aspect ratio, ties by area
    width, height = image.size
    numbers = range(1, MAX_TILES + 1)
    ratios = {(c, r) for c in numbers for r in numbers if c * r <= MAX_TILES}
    best, best_difference = (1, 1), float("inf")
    for cols, rows in sorted(ratios, key=lambda ratio: ratio[0] * ratio[1]):
        difference = abs(width / height - cols / rows)
        if difference < best_difference:
            best, best_difference = (cols, rows), difference
        elif difference == best_difference and width * height > 0.5 * SIDE * SIDE * cols * rows:
            best = (cols, rows)
    cols, rows = best
    resized = resize(image, cols * SIDE, rows * SIDE)
    corners = [(col * SIDE, row * SIDE) for row in range(rows) for col in range(cols)]
    tiles = [resized.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]
    return [*tiles, resize(image, SIDE, SIDE)] if len(tiles) > 1 else tiles


def preprocess(sample):
    image, caption, key = sample
    tiles = np.stack([np.asarray(tile) for tile in dynamic_preprocess(image.convert("RGB"))])
    pixels = (torch.from_numpy(tiles).float() / 255 - MEAN) / STD  # [n, S, S, 3]
    return key, caption, pixels.permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def main(folder, output, checkpoint):
    torch.set_num_threads(2)
    model = InternVLVisionModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    shards = sorted(map(str, Path(folder).glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
    dataset = dataset.to_tuple("jpg", "txt", "__key__").map(preprocess)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    width = pa.list_(pa.float32(), model.config.hidden_size)
    names = {"key": pa.string(), "tile_index": pa.int16(), "txt": pa.string(), "cls": width}
    with pq.ParquetWriter(output, pa.schema(names)) as writer:
        for key, caption, pixels in loader:
            outputs = [model(part).last_hidden_state[:, 0] for part in pixels.split(BATCH_TILES)]
            vectors = torch.cat(outputs).numpy()
            columns = [[key] * len(vectors), range(len(vectors)), [caption] * len(vectors)]
            writer.write_table(pa.table([*columns, list(vectors)], schema=pa.schema(names)))


if __name__ == "__main__":
    main(*sys.argv[1:])
