"""The network: InternViT by its config, from pixels to tokens.

Shapes, all through this file: B tiles, S edge of a tile in pixels, p edge of a patch, G = S / p
patches a side, N = 1 + G² tokens, D hidden size, M intermediate size, H heads, d = D / H.

Follows InternVL's modeling_intern_vit.py (pre-norm blocks with layer scale, exact GELU, no
final norm); module names are its names, so a checkpoint's tensors are our parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attention as AttentionKernel
from model.config import ViTConfig


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the compute dtype, then times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
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
    def __init__(self, config: ViTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.kernel = kernel
        self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)
        # Over all heads together, not head by head.
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each [B, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))  # [B, N, H, d]
        out: Tensor = self.proj(self.kernel(q, k, v).flatten(2))  # [B, N, D]
        return out


class MLP(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))  # inside [B, N, M]
        return out


class Block(nn.Module):
    def __init__(self, config: ViTConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, kernel)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        x = x + self.ls2 * self.mlp(self.norm2(x))
        return x  # noqa: RET504


class Blocks(nn.Module):
    def __init__(self, config: ViTConfig, num_blocks: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, kernel) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class InternViT(nn.Module):
    """The first `num_blocks` blocks of the network.

    Parameters are left as torch makes them: build on the meta device and assign a checkpoint's.
    """

    def __init__(self, config: ViTConfig, num_blocks: int, kernel: AttentionKernel) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config, num_blocks, kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] → tokens [B, N, D] of the last block that is there."""
        tokens: Tensor = self.encoder(self.embeddings(pixels))
        return tokens
