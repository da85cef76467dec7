"""The small member of the one-step LoRA family: what ``ffpe_mini`` is made of, and what trains on a CPU.

Same topology, names and code path as the full-size model (``layout``), a four-hundredth of its weights: 2.1
million parameters, 8.5 MB as float32 with adapters of rank 1, so that it fits into the package.

Where the time goes. At 128 x 128 px one core of a 2 GHz class machine takes 0.19 s for a crop forward and
backward (0.23 s with adapters of rank 1), of which the decoder takes 60 %, the encoder 25 % and the UNet
15 %: nearly all of it in the convolutions at full and half resolution. The first two widths are therefore the
ones that are kept small, in multiples of 8 because that is what convolutions on a CPU are vectorised over.
The UNet works on a latent of an eighth of the side, where width costs weights but hardly time.

One group in the norms of the autoencoder. A group's mean and spread are taken over the whole tile and then
forgotten: with groups of two or four channels, a tile that holds more glass or darker tissue than its
neighbour gets other colours. One group forgets two numbers a tile instead of two for each few channels.

Whole tiles only (``multi_view`` off): a second encoder would add its weights and a quarter of the time, and
its cells leave lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wsi_pipeline.models.layout import SD_TURBO_UNET, SD_TURBO_VAE

__all__ = ["MINI_UNET", "MINI_VAE"]

MINI_UNET: Mapping[str, Any] = {
    **SD_TURBO_UNET,
    "sample_size": 16,
    "block_out_channels": (24, 32, 48, 64),
    "attention_head_dim": (3, 4, 6, 8),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}
"""1.26 million parameters; ``attention_head_dim`` is the number of heads, as in SD-Turbo's configuration."""

MINI_VAE: Mapping[str, Any] = {
    **SD_TURBO_VAE,
    "sample_size": 128,
    "block_out_channels": (16, 24, 48, 64),
    "layers_per_block": 1,
    "norm_num_groups": 1,
}
"""0.83 million parameters with the skip convolutions. Norms of one group: see ``fresh``, on how brightness
passes them."""
