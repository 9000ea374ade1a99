"""uint8 tiles in, float32 embeddings out: one model on one device, or one rank's part of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from model import attention as kernels
from model.batch_choice import choose_batch
from model.checkpoint import Checkpoint
from model.config import count_blocks
from model.errors import UserError
from model.feature_shapes import feature_shape
from model.features import FEATURES
from model.float8 import require_float8
from model.group import ALONE, Group
from model.intern_vit import InternViT
from model.split import WHOLE, Part, check_ranks, head_span, part_of
from model.tensor_names import tensor_names

logger = logging.getLogger(__name__)

DType = Literal["bfloat16", "float16", "float32", "fp8"]
# What the network computes in. fp8 is bfloat16 but for the blocks' linear layers.
DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.bfloat16,
}
EmbeddingDType = Literal["float16", "float32"]
EMBEDDING_DTYPES: Mapping[str, torch.dtype] = {"float16": torch.float16, "float32": torch.float32}
# Tiles of one forward pass where none are asked for: on a GPU the fewest that are about as fast as
# any, found by trying; on a CPU more than a few only take memory.
CPU_BATCH_TILES = 4
LARGEST_BATCH_TILES = 128
DEVICES = ("cpu", "cuda")


class Encoder:
    """An InternViT on a device, ready to embed tiles."""

    def __init__(
        self,
        network: InternViT,
        checkpoint: Checkpoint,
        *,
        dtype: DType,
        device: torch.device,
        features: Sequence[str],
        embedding_dtype: EmbeddingDType,
        batch_tiles: int,
        attention: kernels.Choice,
        group: Group,
    ) -> None:
        self.checkpoint = checkpoint
        self.features = tuple(features)
        self.embedding_dtype = embedding_dtype
        self.batch_tiles = batch_tiles
        self.attention = attention
        self._group = group
        self._network = network
        self._dtype = DTYPES[dtype]
        self._device = device
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._halved = False
        self._mean, self._std = (
            torch.tensor(channel, dtype=torch.float32, device=device).reshape(3, 1, 1)
            for channel in (checkpoint.preprocessor.mean, checkpoint.preprocessor.std)
        )

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: DType,
        device: str,
        layer: int = -1,
        features: Sequence[str] = ("cls", "mean"),
        embedding_dtype: EmbeddingDType = "float32",
        attention: str = "auto",
        batch_tiles: int | None = None,
        group: Group = ALONE,
    ) -> Encoder:
        """Puts the blocks up to `layer` on the device, tensor by tensor, and nothing else.

        With a `group` it is the part of its rank, on the CUDA device of that number, and `encode`
        must be called on all ranks with the same tiles.

        `layer` counts block outputs like a Python list: -1 is the last block, 0 the first.
        On a GPU the blocks are compiled, and `batch_tiles` None is found by trying, half a minute
        behind that; on a CPU it is CPU_BATCH_TILES. Raises UserError for a value that is not on
        offer, naming those that are.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} is not available; choose one of {list(DTYPES)}")
        unknown = [feature for feature in features if feature not in FEATURES]
        if unknown or not features:
            raise UserError(f"features: {list(features)}; choose some of {list(FEATURES)}")
        if batch_tiles is not None and batch_tiles < 1:
            raise UserError(f"batch_tiles: {batch_tiles}; expected at least 1")
        config = checkpoint.config
        num_blocks = count_blocks(config, layer)
        check_ranks(config, group.size)
        place = _device(device, group.rank)
        if dtype == "fp8":
            require_float8(place)
        choice = _choose_attention(attention, checkpoint, DTYPES[dtype], place, group)

        with torch.device("meta"):
            network = InternViT(config, num_blocks, kernels.kernel(choice.name), group)
        parts = {
            name: part_of(name, config, group.rank, group.size) or WHOLE
            for name in network.state_dict()
        }
        # no name for the weights: fp8 drops them layer by layer
        network.load_state_dict(read_weights(checkpoint, parts, DTYPES[dtype], place), assign=True)
        network.requires_grad_(False).eval()
        if dtype == "fp8":
            network.to_float8()
        encoder = cls(
            network,
            checkpoint,
            dtype=dtype,
            device=place,
            features=features,
            embedding_dtype=embedding_dtype,
            batch_tiles=batch_tiles or CPU_BATCH_TILES,
            attention=choice,
            group=group,
        )
        if place.type == "cuda":
            network.compile_blocks()
            torch.cuda.empty_cache()
            if batch_tiles is None:
                encoder.batch_tiles = encoder._find_batch()
            else:  # compiles; torch has code of its own for a single tile
                encoder._seconds(batch_tiles)
                encoder._seconds(1)
        return encoder

    @torch.inference_mode()
    def encode(self, tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """Embeds tiles: uint8 [n, S, S, 3] in RGB → each feature [n, hidden] or [n, tokens, D].

        S is `checkpoint.preprocessor.crop`, or any multiple of the patch size (positions are
        then interpolated); n may be 0. The tiles are only read. `cls` is the class token of the
        chosen block, `mean` the mean of its patch tokens, `tokens` all of them and `tokens-2x2`
        InternVL's pixel shuffle of the patch tokens; no norm follows. Values have the
        `embedding_dtype` of the encoder. In float16 an infinity is a value that it cannot hold; a
        tile for which the network gave anything that is not finite has a NaN.
        """
        self.check(tiles)
        try:
            return self._encode(tiles)
        except torch.OutOfMemoryError:
            if self._halved or self._group.size > 1 or self.batch_tiles == 1:
                raise
            # Of several ranks one may run out of memory while the others wait for it: they fail.
            self._halved = True
            self.batch_tiles //= 2
            logger.warning("out of memory: batch_tiles is %d from here on", self.batch_tiles)
        torch.cuda.empty_cache()
        return self._encode(tiles)

    def _encode(self, tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        features = {name: self._empty(name, *tiles.shape[:2]) for name in self.features}
        waiting: list[tuple[int, dict[str, Tensor]]] = []
        for start in range(0, len(tiles), self.batch_tiles):
            batch = self._stage(tiles[start : start + self.batch_tiles])
            waiting.append((start, self._forward(batch)))
            # A GPU's work is put under way before any of it is waited for: the next micro-batch
            # goes there while this one is computed, and features stay until the last one is done.
            if self._device.type == "cpu":
                _fetch(waiting, features)
        _fetch(waiting, features)
        return features

    def _empty(self, feature: str, num_tiles: int, side: int) -> npt.NDArray[Any]:
        shape = feature_shape(feature, self.checkpoint.config, side)
        inner = (shape,) if isinstance(shape, int) else shape
        return np.empty((num_tiles, *inner), self.embedding_dtype)

    def check(self, tiles: npt.NDArray[np.uint8]) -> None:
        """Raises ValueError for tiles that `encode` does not take."""
        if (
            tiles.dtype != np.uint8
            or tiles.ndim != 4
            or tiles.shape[1:] != (tiles.shape[2],) * 2 + (3,)
        ):
            raise ValueError(f"tiles: {tiles.dtype} {tiles.shape}; expected uint8 [n, S, S, 3]")
        if tiles.shape[1] % self.checkpoint.config.patch_size:
            raise ValueError(f"tiles: edge {tiles.shape[1]} does not divide into patches")

    def _stage(self, tiles: npt.NDArray[np.uint8]) -> Tensor:
        """Sends a micro-batch [b, S, S, 3] to the device, ready for the work that follows there.

        By way of a staging copy, because torch takes no read-only array.
        """
        if self._copies is None:
            return torch.from_numpy(tiles.copy())
        staged = torch.empty(tiles.shape, dtype=torch.uint8, pin_memory=True)
        staged.numpy()[...] = tiles
        with torch.cuda.stream(self._copies):
            sent = staged.to(self._device, non_blocking=True)
            arrived = self._copies.record_event()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        sent.record_stream(stream)
        return sent

    def _forward(self, tiles: Tensor) -> dict[str, Tensor]:
        """uint8 [b, S, S, 3] on the device → each feature there, [b, hidden] or [b, tokens, D]."""
        pixels = (tiles.permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std  # [b, 3, S, S]
        tokens = self._network(pixels.to(self._dtype))  # [b, N, hidden]
        dtype = EMBEDDING_DTYPES[self.embedding_dtype]
        return {feature: _stored(FEATURES[feature](tokens), dtype) for feature in self.features}

    def _find_batch(self) -> int:
        """Tiles of a forward pass by trying: rank 0 decides, the others follow.

        Raises UserError where several ranks run out of memory: they cannot go on from there.
        """

        def trial(tiles: int) -> float:
            try:
                return self._seconds(self._group.from_first(tiles))
            except torch.OutOfMemoryError as error:
                if self._group.size == 1:
                    raise
                raise UserError(
                    f"batch_tiles: out of memory at {tiles} tiles over {self._group.size} ranks; "
                    f"give a smaller number instead of auto"
                ) from error

        largest = self._largest_batch()
        for tiles in (2, 1)[largest == 1 :]:  # compiles
            self._seconds(tiles)
        if self._group.rank == 0:
            found = choose_batch(trial, largest=largest).batch_tiles
            self._group.from_first(0)
            return self._group.from_first(found)
        while tiles := self._group.from_first(0):
            self._seconds(tiles)
        return self._group.from_first(0)

    def _largest_batch(self) -> int:
        """What the free memory of the device holds, by the widest activations of a block."""
        config = self.checkpoint.config
        free, _ = torch.cuda.mem_get_info(self._device)
        num_tokens = 1 + (self.checkpoint.preprocessor.crop // config.patch_size) ** 2
        # MLP before and after GELU, qkv, three residual streams; half as much again to be safe
        widest = 2 * config.intermediate_size // self._group.size + 6 * config.hidden_size
        tile_bytes = 1.5 * num_tokens * widest * self._dtype.itemsize
        fitting = max(1, min(LARGEST_BATCH_TILES, int(free / tile_bytes)))
        return self._group.from_first(fitting)

    @torch.inference_mode()
    def _seconds(self, batch_tiles: int) -> float:
        """Seconds of a forward pass of so many tiles: the second one, the first compiles."""
        side = self.checkpoint.preprocessor.crop
        tiles = torch.zeros(batch_tiles, side, side, 3, dtype=torch.uint8, device=self._device)
        try:
            for _ in range(2):
                torch.cuda.synchronize(self._device)
                began = time.perf_counter()
                self._forward(tiles)
                torch.cuda.synchronize(self._device)
            return time.perf_counter() - began
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[b, ...] in the type that is stored, see `encode`."""
    stored = values.to(dtype).contiguous()
    if dtype == torch.float16:
        finite = values.isfinite().flatten(1).all(1)
        stored.view(len(stored), -1)[:, 0].masked_fill_(~finite, torch.nan)
    return stored


def _fetch(
    waiting: list[tuple[int, dict[str, Tensor]]], features: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Takes what micro-batches gave into `features`, from the tile with which each began."""
    for start, output in waiting:
        for name, values in output.items():
            torch.from_numpy(features[name][start : start + len(values)]).copy_(values)
    waiting.clear()


def _choose_attention(
    name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, group: Group
) -> kernels.Choice:
    """Rank 0's choice: where it is measured, ranks might come to different ones."""
    config = checkpoint.config
    first, last = head_span(config, group.rank, group.size)
    shape = (16, config.num_tokens, last - first, config.head_dim)
    if group.rank == 0:
        choice = kernels.resolve(name, device, dtype, shape)
        group.from_first(kernels.NAMES.index(choice.name))
        return choice
    return kernels.Choice(kernels.NAMES[group.from_first(0)])


def read_weights(
    checkpoint: Checkpoint, parts: Mapping[str, Part], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The named parts of our network's parameters from a checkpoint of any layout.

    Files are memory-mapped, and of a tensor only the part is read. What already has the dtype, lies
    in one piece and stays in host memory is the mapped file itself; the rest is converted or sent
    to the device one by one.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in checkpoint.files]
        home = {name: file for file in files for name in file.keys()}  # noqa: SIM118

        def read(parameter: str, part: Part) -> Tensor:
            names = tensor_names(parameter, checkpoint.layout, checkpoint.prefix)
            if part.dim is None:
                pieces = [home[name].get_tensor(name) for name in names]
            elif part.dim == 1:
                (name,), ((start, stop),) = names, part.spans
                pieces = [home[name].get_slice(name)[:, start:stop]]
            else:
                pieces = []
                for start, stop in part.spans:
                    # a span never crosses from one of q, k, v to the next
                    rows = home[names[0]].get_slice(names[0]).get_shape()[0]
                    name, above = names[start // rows], start // rows * rows
                    pieces.append(home[name].get_slice(name)[start - above : stop - above])
            pieces = [piece.to(device).to(dtype) for piece in pieces]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return {parameter: read(parameter, part) for parameter, part in parts.items()}


def _device(name: str, index: int) -> torch.device:
    if name not in DEVICES:
        raise UserError(f"device: {name!r}; choose one of {list(DEVICES)}")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() <= index:
        found = torch.cuda.device_count() or "no"
        raise UserError(f"device: cuda, device {index} of them; torch finds {found} CUDA devices")
    return torch.device("cuda", index)
