"""The networks that are measured, with random weights on a device.

They share their bfloat16 weights. torch alone: nothing of Ray or of storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.timing import SEED, Product, attempt
from model import attention as kernels
from model.config import ViTConfig
from model.float8 import require_float8
from model.intern_vit import InternViT
from model.random_checkpoint import config_json, random_parameter
from model.tensor_names import Shape, parameter_shapes, tensor_names

THEIRS, THEIRS_COMPILED = "transformers, sdpa", "transformers, sdpa, compiled"
OURS, OURS_FP8 = "ours, bfloat16", "ours, fp8"


@dataclass(frozen=True)
class Contender:
    """`forward` takes normalised pixels [B, 3, S, S] to tokens [B, N, D], both bfloat16.

    `product` is the kind of matrix product that it is made of.
    """

    name: str
    product: Product
    module: Any
    forward: Callable[[Tensor], Tensor]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.module.state_dict().values())


def build(
    config: ViTConfig, device: torch.device, choice: kernels.Choice
) -> tuple[list[Contender], list[str]]:
    """Contenders that the device can hold and run, and notes about what is not as on a GPU."""
    weights = random_weights(parameter_shapes(config), device)
    theirs, compiled = (transformers_model(config, weights) for _ in range(2))
    ours = our_network(config, weights, choice)
    notes = []
    # Layer by layer: the same code as for the whole, and compiled once instead of 45 times. torch
    # needs a C++ compiler to generate code for a CPU, which a machine may lack.
    for layer in compiled.encoder.layer:
        layer.compile(backend="inductor" if device.type == "cuda" else "aot_eager", dynamic=True)
    if device.type == "cuda":
        ours.compile_blocks()
    else:
        notes.append("on a CPU ours is not compiled, and transformers only traced (aot_eager)")

    def float8() -> Contender:
        require_float8(device)
        network = our_network(config, weights, choice)
        network.to_float8()
        network.compile_blocks()
        return Contender(OURS_FP8, "fp8", network, network)

    contenders = [
        Contender(THEIRS, "bfloat16", theirs, lambda x: theirs(x).last_hidden_state),
        Contender(THEIRS_COMPILED, "bfloat16", compiled, lambda x: compiled(x).last_hidden_state),
        Contender(OURS, "bfloat16", ours, ours),
    ]
    built = attempt(float8)
    if isinstance(built, str):
        return contenders, [*notes, f"{OURS_FP8} is left out: {built}"]
    return [*contenders, built], notes


def random_weights(shapes: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
    """Parameters by our names as a random checkpoint has them, bfloat16, made on the device."""
    generator = torch.Generator(device).manual_seed(SEED)
    with device:
        return {n: random_parameter(n, s, generator).to(torch.bfloat16) for n, s in shapes.items()}


def random_pixels(config: ViTConfig, batch: int, device: torch.device) -> Tensor:
    """Normalised pixels [batch, 3, S, S], bfloat16."""
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (batch, 3, config.image_size, config.image_size)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)


def our_network(
    config: ViTConfig, weights: Mapping[str, Tensor], choice: kernels.Choice
) -> InternViT:
    with torch.device("meta"):
        network = InternViT(config, config.num_layers, kernels.kernel(choice.name))
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


def transformers_model(config: ViTConfig, weights: Mapping[str, Tensor]) -> Any:
    """InternVLVisionModel on the very same tensors; its q, k and v are views of our qkv."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    document = config_json(config, "transformers", "bfloat16")
    with torch.device("meta"):
        model: Any = InternVLVisionModel(
            InternVLVisionConfig.from_dict(document, attn_implementation="sdpa")
        )
    assert model.config._attn_implementation == "sdpa"
    theirs: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        names = tensor_names(name, "transformers", "")
        theirs |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True)
    model.load_state_dict(theirs, assign=True)
    return model.requires_grad_(False).eval()


def float32_tokens(theirs: Any, pixels: Tensor) -> Tensor:
    """transformers' network in float32, layer by layer: 22 GB of weights never exist at once."""

    def in_float32(module: nn.Module, x: Tensor) -> Tensor:
        weights = {name: weight.float() for name, weight in module.named_parameters()}
        tokens: Tensor = functional_call(module, weights, (x,))
        return tokens

    tokens = in_float32(theirs.embeddings, pixels.float())
    for layer in theirs.encoder.layer:
        tokens = in_float32(layer, tokens)
    return tokens
