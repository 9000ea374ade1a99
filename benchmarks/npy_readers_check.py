"""Runs where autofaiss and clip-retrieval are installed, without this project; see npy_readers.py.

python npy_readers_check.py FOLDER FEATURE,...   prints one JSON document as its last line
"""

import json
import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from autofaiss import build_index
from embedding_reader import EmbeddingReader

PACKAGES = ("autofaiss", "clip_retrieval", "embedding-reader", "faiss-cpu", "numpy", "pyarrow")
COLUMNS = ["key", "txt", "json:url", "tile_index"]


def without_its_models() -> None:
    """clip_retrieval's own __init__ loads img2dataset, CLIP and wandb, which indexing and serving
    do not use; `torch` is imported by a query and not used for one that is a vector."""
    package = types.ModuleType("clip_retrieval")
    package.__path__ = find_spec("clip_retrieval").submodule_search_locations
    sys.modules["clip_retrieval"] = package
    sys.modules["torch"] = types.ModuleType("torch")


def read_in_pairs(arrays: Path, tables: Path, expected: dict, feature: str) -> int:
    """embedding-reader's parquet_npy: vectors beside their rows."""
    reader = EmbeddingReader(
        str(arrays), "parquet_npy", meta_columns=COLUMNS, metadata_folder=str(tables)
    )
    assert reader.count == len(expected["name"])
    seen = 0
    for vectors, rows in reader(batch_size=7, show_progress=False):
        for vector, (_, row) in zip(vectors, rows.iterrows(), strict=True):
            at = expected["at"][f"{row['txt']} {row['tile_index']}"]
            assert np.array_equal(vector, expected[feature][at]), row
            seen += 1
    return seen


def search_all(index, vectors: np.ndarray) -> np.ndarray:
    """Position of the nearest vector of each."""
    return index.search(vectors.astype(np.float32), 1)[1][:, 0]


def index_alone(arrays: Path, expected: dict, feature: str) -> int:
    """autofaiss over the folder; its ids are positions in the order of names."""
    index, _ = build_index(
        str(arrays), save_on_disk=False, metric_type="l2", index_key="Flat", verbose=40
    )
    in_order = np.concatenate([np.load(path) for path in sorted(arrays.iterdir())])
    assert index.ntotal == len(in_order) == len(expected["name"])
    assert np.array_equal(search_all(index, in_order), np.arange(len(in_order)))
    return index.ntotal


def serve(embeddings: Path, folder: Path, subfolder: str, hdf5: bool, expected: dict) -> int:
    """clip-retrieval: index the folder, then ask its back end for every vector's caption."""
    from clip_retrieval import clip_back
    from clip_retrieval.clip_index import clip_index
    from flask import Flask
    from flask_restful import Api

    clip_index(str(embeddings), str(folder), image_subfolder=subfolder)
    index = clip_back.load_index(f"{folder}/image.index", False)
    provider, _ = clip_back.load_metadata_provider(str(folder), hdf5, False, index, COLUMNS, False)
    nothing = dict.fromkeys(clip_back.ClipResource.__dataclass_fields__)
    resource = clip_back.ClipResource(
        **{**nothing, "device": "cpu", "metadata_provider": provider, "image_index": index,
           "columns_to_return": COLUMNS, "metadata_is_ordered_by_ivf": False}
    )  # fmt: skip
    app = Flask(__name__)
    Api(app).add_resource(
        clip_back.KnnService,
        "/knn-service",
        resource_class_kwargs={"clip_resources": {"i": resource}},
    )
    client = app.test_client()
    feature = expected["feature"]
    for name, vector in zip(expected["name"], expected[feature], strict=True):
        asked = {
            "embedding_input": [float(value) for value in vector], "modality": "image",
            "num_images": 1, "indice_name": "i",
        }  # fmt: skip
        answer = client.post("/knn-service", json=asked)
        assert answer.status_code == 200, answer.data
        (found,) = answer.json
        assert f"{found['txt']} {found['tile_index']}" == name, (found, name)
        assert found["json:url"] == f"u/{found['txt'].split()[-1]}"
    return len(expected["name"])


def main() -> None:
    without_its_models()
    folder, features = Path(sys.argv[1]), sys.argv[2].split(",")
    embeddings = folder / "out/embeddings"
    expected = dict(np.load(folder / "expected.npz"))
    expected["at"] = {name: at for at, name in enumerate(expected["name"].tolist())}
    checks = {}
    for feature in features:
        subfolder = "img_emb" if len(features) == 1 else feature
        arrays = embeddings / subfolder
        expected["feature"] = feature
        checks[f"{feature}: embedding-reader, arrays beside tables"] = read_in_pairs(
            arrays, embeddings / "metadata", expected, feature
        )
        checks[f"{feature}: autofaiss build_index"] = index_alone(arrays, expected, feature)
        for hdf5 in (False, True):
            kind = "hdf5" if hdf5 else "parquet"
            checks[f"{feature}: clip-retrieval index, back end with {kind} metadata"] = serve(
                embeddings, folder / f"index-{feature}-{kind}", subfolder, hdf5, expected
            )
    print(json.dumps({"versions": {name: version(name) for name in PACKAGES}, "checks": checks}))


if __name__ == "__main__":
    main()
