"""The public API of `model/`: uint8 tiles in, float32 embeddings out, on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from model import attention as kernels
from model.checkpoint import Checkpoint
from model.config import count_blocks
from model.errors import UserError
from model.intern_vit import InternViT
from model.tensor_names import tensor_names

DType = Literal["float32", "bfloat16"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Tokens [b, N, hidden] of a block → a feature [b, hidden], float32. `cls` is a copy, not a view,
# so that it does not keep all tokens in memory.
FEATURES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda tokens: tokens[:, 0].to(torch.float32, copy=True),
    "mean": lambda tokens: tokens[:, 1:].mean(1, dtype=torch.float32),
}
# Tiles of one forward pass where none are asked for. 32 tiles are 32 800 token rows at 448
# pixels: enough to fill a GPU, with 0.9 GB of MLP activations for the 6B in bfloat16. On a CPU
# more tiles than a few only take memory.
AUTO_BATCH_TILES = {"cuda": 32, "cpu": 4}


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
        batch_tiles: int,
    ) -> None:
        self.checkpoint = checkpoint
        self.features = tuple(features)
        self.batch_tiles = batch_tiles
        self._network = network
        self._dtype = DTYPES[dtype]
        self._device = device
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
        attention: str = "auto",
        batch_tiles: int | None = None,
    ) -> Encoder:
        """Puts the blocks up to `layer` on the device, tensor by tensor, and nothing else.

        `layer` counts block outputs like a Python list: -1 is the last block, 0 the first.
        `batch_tiles` None stands for AUTO_BATCH_TILES. Raises UserError for a value that is not
        on offer, naming those that are.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} is not available; choose one of {list(DTYPES)}")
        unknown = [feature for feature in features if feature not in FEATURES]
        if unknown or not features:
            raise UserError(f"features: {list(features)}; choose some of {list(FEATURES)}")
        if batch_tiles is not None and batch_tiles < 1:
            raise UserError(f"batch_tiles: {batch_tiles}; expected at least 1")
        num_blocks = count_blocks(checkpoint.config, layer)
        place = _device(device)
        kernel = kernels.KERNELS[kernels.resolve(attention)]

        with torch.device("meta"):
            network = InternViT(checkpoint.config, num_blocks, kernel)
        weights = read_weights(checkpoint, list(network.state_dict()), DTYPES[dtype], place)
        network.load_state_dict(weights, assign=True)
        network.requires_grad_(False).eval()
        return cls(
            network,
            checkpoint,
            dtype=dtype,
            device=place,
            features=features,
            batch_tiles=batch_tiles or AUTO_BATCH_TILES[place.type],
        )

    @torch.inference_mode()
    def encode(self, tiles: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """Embeds tiles: uint8 [n, S, S, 3] in RGB → each feature float32 [n, hidden].

        S is `checkpoint.preprocessor.crop`, or any multiple of the patch size (positions are
        then interpolated); n may be 0. The tiles are only read. `cls` is the class token of the
        chosen block, `mean` the mean of its patch tokens; no norm follows.
        """
        if (
            tiles.dtype != np.uint8
            or tiles.ndim != 4
            or tiles.shape[1:] != (tiles.shape[2],) * 2 + (3,)
        ):
            raise ValueError(f"tiles: {tiles.dtype} {tiles.shape}; expected uint8 [n, S, S, 3]")
        if tiles.shape[1] % self.checkpoint.config.patch_size:
            raise ValueError(f"tiles: edge {tiles.shape[1]} does not divide into patches")
        # On a GPU the outputs stay there until all is under way, so that the next micro-batch
        # is prepared while this one is computed.
        outputs = [
            self._forward(tiles[start : start + self.batch_tiles])
            for start in range(0, len(tiles), self.batch_tiles)
        ]
        empty = np.empty((0, self.checkpoint.config.hidden_size), np.float32)
        return {
            feature: torch.cat([o[feature] for o in outputs]).cpu().numpy() if outputs else empty
            for feature in self.features
        }

    def _forward(self, tiles: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
        """One micro-batch: [b, S, S, 3] → each feature [b, hidden], float32, on the device."""
        # A staging copy of one micro-batch, because torch takes no read-only array. Pinned
        # memory is not handed out again before the copy from it is done.
        staged = torch.empty(tiles.shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        staged.numpy()[...] = tiles
        pixels = staged.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
        pixels = (pixels / 255 - self._mean) / self._std  # [b, 3, S, S]
        tokens = self._network(pixels.to(self._dtype))  # [b, N, hidden]
        return {feature: FEATURES[feature](tokens) for feature in self.features}


def read_weights(
    checkpoint: Checkpoint, parameters: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The named parameters of our network from a checkpoint of any layout.

    Files are memory-mapped. A tensor that already has the dtype and stays in host memory is the
    mapped file itself; any other is converted or sent to the device one by one.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in checkpoint.files]
        home = {name: file for file in files for name in file.keys()}  # noqa: SIM118

        def read(parameter: str) -> Tensor:
            names = tensor_names(parameter, checkpoint.layout, checkpoint.prefix)
            parts = [home[name].get_tensor(name).to(device).to(dtype) for name in names]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return {parameter: read(parameter) for parameter in parameters}


def _device(name: str) -> torch.device:
    if name not in AUTO_BATCH_TILES:
        raise UserError(f"device: {name!r}; choose one of {sorted(AUTO_BATCH_TILES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch finds no CUDA device here")
    return torch.device(name)
