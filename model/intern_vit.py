"""The network: InternViT by its config, from pixels to tokens.

Shapes, all through this file: B tiles, S edge of a tile in pixels, p edge of a patch, G = S / p
patches a side, N = 1 + G² tokens, D hidden size, M intermediate size, H heads, d = D / H.
Of a model that is split over several ranks, H and M below are this rank's own.

Follows InternVL's modeling_intern_vit.py (pre-norm blocks with layer scale, exact GELU, no
final norm); module names are its names, so a checkpoint's tensors are our parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention as AttentionKernel
from model.config import ViTConfig
from model.float8 import Float8Linear
from model.group import ALONE, Group
from model.split import head_span, mlp_span


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the compute dtype, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x, x.float().square().mean(-1, keepdim=True))

    def scale(self, x: Tensor, mean_square: Tensor) -> Tensor:
        """x normalised by a mean of squares [..., 1], float32, that is already known."""
        x32 = x.float() * torch.rsqrt(mean_square + self.eps)
        return self.weight * x32.to(x.dtype)


def make_norm(config: ViTConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class Embeddings(nn.Module):
    """Patches to tokens, the class token in front, learned positions added."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        self.learned_grid = config.image_size // p
        self.class_embedding = nn.Parameter(torch.empty(1, 1, D))
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_tokens, D))
        self.patch_embedding = nn.Conv2d(3, D, kernel_size=p, stride=p)

    def forward(self, pixels: Tensor) -> Tensor:
        B, C, S, _ = pixels.shape  # [B, 3, S, S]
        p = self.patch_embedding.stride[0]
        G = S // p
        # A convolution whose stride is its kernel is one matrix product over cut-out patches;
        # as a product it is exact in float32 where cuDNN's convolution would use TF32.
        patches = pixels.reshape(B, C, G, p, G, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(B, G * G, C * p * p)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        x = torch.cat([self.class_embedding.expand(B, -1, -1), x], dim=1)  # [B, N, D]
        return x + self.positions(G)

    def positions(self, grid: int) -> Tensor:
        """[1, N, D]: as learned, or bicubically interpolated to another grid of patches."""
        learned, known = self.position_embedding, self.learned_grid
        if grid == known:
            return learned
        patches = learned[:, 1:].float().reshape(1, known, known, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2).to(learned.dtype)
        return torch.cat([learned[:, :1], patches], dim=1)


class Attention(nn.Module):
    def __init__(self, config: ViTConfig, kernel: AttentionKernel, group: Group) -> None:
        super().__init__()
        D = config.hidden_size
        first, last = head_span(config, group.rank, group.size)
        self.num_heads = last - first
        self.hidden_size = D
        self.kernel = kernel
        self.group = group
        width = self.num_heads * config.head_dim
        self.qkv = nn.Linear(D, 3 * width, bias=config.qkv_bias)
        self.q_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps) if config.qk_norm else None
        self.proj = nn.Linear(width, D, bias=group.rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each [B, N, H d]
        if self.q_norm is not None and self.k_norm is not None:
            # Over all heads together, not head by head: the mean of squares is over all ranks.
            squares = torch.stack([t.float().square().sum(-1) for t in (q, k)], dim=-1)
            squares = self.group.all_reduce(squares) / self.hidden_size  # [B, N, 2]
            q = self.q_norm.scale(q, squares[..., :1])
            k = self.k_norm.scale(k, squares[..., 1:])
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # [B, N, H, d]
        return self.group.all_reduce(self.proj(self.kernel(q, k, v).flatten(2)))  # [B, N, D]


class MLP(nn.Module):
    def __init__(self, config: ViTConfig, group: Group) -> None:
        super().__init__()
        first, last = mlp_span(config, group.rank, group.size)
        self.group = group
        self.fc1 = nn.Linear(config.hidden_size, last - first)
        self.fc2 = nn.Linear(last - first, config.hidden_size, bias=group.rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.fc2(F.gelu(self.fc1(x))))  # inside [B, N, M]


class Block(nn.Module):
    def __init__(self, config: ViTConfig, kernel: AttentionKernel, group: Group) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, kernel, group)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = make_norm(config)
        self.mlp = MLP(config, group)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        x = x + self.ls2 * self.mlp(self.norm2(x))
        return x  # noqa: RET504


class Blocks(nn.Module):
    def __init__(
        self, config: ViTConfig, num_blocks: int, kernel: AttentionKernel, group: Group
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, kernel, group) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class InternViT(nn.Module):
    """The first `num_blocks` blocks of the network, as far as one rank holds them.

    Parameters are left as torch makes them: build on the meta device and assign a checkpoint's.
    """

    def __init__(
        self,
        config: ViTConfig,
        num_blocks: int,
        kernel: AttentionKernel,
        group: Group = ALONE,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config, num_blocks, kernel, group)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] → tokens [B, N, D] of the last block that is there."""
        tokens: Tensor = self.encoder(self.embeddings(pixels))
        return tokens

    def compile_blocks(self) -> None:
        """Lets torch.compile fuse what lies between the matrix products.

        Blocks are alike, so one is compiled and all use its code, for any number of tiles; a single
        tile has code of its own.
        """
        for block in self.encoder.layers:
            block.compile(dynamic=True)

    def to_float8(self) -> None:
        """Gives the blocks' linear layers float8 weights, one after the other."""
        for block in self.encoder.layers:
            for module in list(block.modules()):
                for name, linear in list(module.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(module, name, Float8Linear.from_weight(linear.weight, linear.bias))
