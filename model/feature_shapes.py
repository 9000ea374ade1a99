"""How many values a feature has of one tile. Free of torch: options and plans ask it too."""

from __future__ import annotations

from model.config import ViTConfig
from model.errors import UserError

CLASS_TOKENS = 1
SHUFFLED = 2  # patches a side that become one token of `tokens-2x2`
TOKEN_FEATURES = ("tokens", "tokens-2x2")


def feature_shape(name: str, config: ViTConfig, side: int) -> int | tuple[int, int]:
    """D values, or tokens x D, of a tile of `side` pixels.

    Raises:
        UserError: a tile has an odd number of patches a side, which no 2×2 fills.
    """
    if name not in TOKEN_FEATURES:
        return config.hidden_size
    patches = side // config.patch_size
    if name == "tokens":
        return CLASS_TOKENS + patches * patches, config.hidden_size
    if patches % SHUFFLED:
        raise UserError(
            f"features: tokens-2x2 needs an even number of patches a side, and a tile of {side} "
            f"pixels has {patches}; ask for tokens"
        )
    return (patches // SHUFFLED) ** 2, SHUFFLED**2 * config.hidden_size
