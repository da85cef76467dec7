"""Noise that belongs to the slide and not to the tile: two tiles see the same values where they overlap.

The plane of *cells* (pixels, or latent pixels: whatever a generator draws noise for) is cut into blocks of
64 x 64 from the slide's corner. Block (by, bx) is drawn at once by a counter-based generator (Philox; Salmon
et al. 2011) whose key is a hash of everything that names it. Any region is put together from blocks, so its
values depend neither on the tile nor on the batch, order, process or device that asks for it.

What the values rely on. The bits of Philox are the same in every numpy (NEP 19). The normals are numpy's
float32 ziggurat, which numpy may change but has not since 1.17 (1.26, 2.0 and 2.4 give equal bytes). One
value in 4000 lies in a tail that takes a logarithm from the C library, whose last bit may differ between
platforms. A test holds numbers that were drawn before, so a change cannot pass unseen.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.geometry import Region, ceil_div

__all__ = ["NOISE_BLOCK", "lattice_normal", "noise_key"]

NOISE_BLOCK = 64
"""Side in cells of what is drawn at once; another value is another noise."""


def noise_key(seed: int, identity: str) -> int:
    """The key of one slide's noise, 128 bits; ``identity`` is the digest of the slide's content."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{identity}".encode()).digest()[:16], "little")


def lattice_normal(
    region: Region, *, key: int, channels: int, step: int = 0, level: int = 0, z: int = 0
) -> npt.NDArray[np.float32]:
    """Independent standard normals of ``region``, [channels, H, W] float32.

    ``region`` counts cells and may begin anywhere, also at negative coordinates: the noise of a part is the
    part of the noise, bit for bit. ``key`` is ``TileBatch.noise_key`` (any integer will do); each ``step`` of
    a sampler, ``level`` of a pyramid and plane ``z`` has noise of its own. The first channels are the same
    however many are asked for. One core draws 3 x 256 x 256 in 2 to 3 ms.
    """
    noise_CHW = np.empty((channels, region.height, region.width), np.float32)
    rows = range(region.y // NOISE_BLOCK, ceil_div(region.bottom, NOISE_BLOCK))
    cols = range(region.x // NOISE_BLOCK, ceil_div(region.right, NOISE_BLOCK))
    for by in rows:
        for bx in cols:
            block = Region(by * NOISE_BLOCK, bx * NOISE_BLOCK, NOISE_BLOCK, NOISE_BLOCK)
            part = block.intersect(region)
            if part is None:  # an empty region inside a block
                continue
            drawn_CHW = _block_normal(f"{key},{level},{step},{z},{by},{bx}", channels)
            noise_CHW[:, *part.slices(region)] = drawn_CHW[:, *part.slices(block)]
    return noise_CHW


def _block_normal(name: str, channels: int) -> npt.NDArray[np.float32]:
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return random.standard_normal((channels, NOISE_BLOCK, NOISE_BLOCK), dtype=np.float32)
