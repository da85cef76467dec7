"""Colour: from the slide's embedded ICC profile to sRGB, through LittleCMS.

Why before the model. Two scanners describe the same pink with different numbers and an ICC profile each;
viewers apply the profile, naive readers do not. A generator should see one colour space.
"""

from __future__ import annotations

import io
import threading
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from wsi_pipeline.core.protocols import U8_HWC
from wsi_pipeline.errors import UnsupportedSlideError

__all__ = ["srgb_profile", "to_srgb"]

_PER_THREAD = threading.local()
_MAX_TRANSFORMS = 8


def to_srgb(pixels_HWC: U8_HWC, profile: bytes, *, slide_id: str = "image") -> U8_HWC:
    """Pixels [H, W, 3] uint8 of the given ICC profile in sRGB, relative colorimetric, pixel by pixel.

    The result of a pixel depends on that pixel alone. Raises UnsupportedSlideError for a profile that is
    damaged or describes no RGB device.
    """
    if pixels_HWC.size == 0:
        return pixels_HWC
    try:
        transform = _transform(profile)
        converted = ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(pixels_HWC)), transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UnsupportedSlideError(
            f"{slide_id}: the embedded ICC profile cannot be applied ({error}); use icc: ignore to take the "
            "pixels as sRGB",
            slide_id=slide_id,
        ) from error
    return np.asarray(converted, np.uint8)


def _transform(profile: bytes) -> ImageCms.ImageCmsTransform:
    # LittleCMS keeps scratch state inside a transform: one per thread needs no lock.
    cache: dict[bytes, ImageCms.ImageCmsTransform] = _PER_THREAD.__dict__.setdefault("transforms", {})
    if profile not in cache:
        if len(cache) >= _MAX_TRANSFORMS:
            cache.clear()
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(io.BytesIO(srgb_profile()))
        cache[profile] = ImageCms.buildTransform(
            source, target, "RGB", "RGB", renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
    return cache[profile]


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """An sRGB ICC profile, the same bytes every time (LittleCMS stamps the creation time into the header)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes((0x07, 0xE8, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0))  # 2024-01-01 (ICC.1, 7.2.10)
    profile[84:100] = bytes(16)  # profile ID: not computed
    return bytes(profile)
