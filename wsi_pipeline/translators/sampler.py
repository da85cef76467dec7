"""From noise, or from a source image, to an image: one loop for every path, representation and condition."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators.parts import Net, Parts
from wsi_pipeline.translators.settings import SamplingConfig

__all__ = ["draw", "estimate"]


def draw(
    net: Net,
    parts: Parts,
    sampling: SamplingConfig,
    *,
    source: Tensor | None = None,
    label: Tensor | None = None,
    noise: Callable[[int], Tensor],
    value_range: tuple[float, float] = (-1.0, 1.0),
    watch: Callable[[int, int, Tensor, Tensor], None] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The image at the end of ``sampling.nfe`` jumps, in shape and range as those of training; no gradients.

    ``source``: [B, sources * C, ...]. ``label``: int64 [B]; None: of no class in particular.
    ``noise(k)``: standard normals of pixels, [B,C,...] as the target image; encoded here. It is asked for

        k = 0             the start of a ``vp`` run; the hole of ``known`` where a bridge has no ``source``
        k = 1 .. nfe      the k-th jump, in order; not for the last one, nor for any jump of an ``ode``
                          bridge, of ``ddim`` or of ``dpmsolver``
        k = nfe + 1 ..    the known pixels after jump k - nfe; not where their state is without noise

    and never twice for one k. ``watch(k, m, x_m, x0_hat)`` sees, after jump k = 0 .. nfe - 1, the step m
    that it reached, the state there and the estimate that it used, both as pixels.
    ``known``: (mask, image), mask [B,1,...] is 1 where pixels are to be drawn; elsewhere every state is made
    of the image (I2SB; Lugmayr et al., CVPR 2022).
    """
    path, rep, grid = parts.path, parts.representation, parts.path.grid(sampling.nfe, sampling.method)
    classes, drop = parts.condition.config.classes, parts.condition.config.drop
    if not drop and (sampling.guidance != 1.0 or (classes and label is None)):
        raise ConfigError("sampling: guidance, and no label, need a translator trained with condition.drop")
    with torch.no_grad():
        if known is not None and source is None and not path.from_noise:
            source = torch.where(known[0].bool(), noise(0), known[1])
        x1, source_h = parts.encode_source(source)
        x = path.start(x1, rep.encode_noise(noise(0)) if path.from_noise else None)
        if label is None:
            label = torch.full((len(x),), classes, device=x.device)
        step = path.stepper(grid, sampling.method)
        for k, (n, m) in enumerate(pairwise(grid)):
            x0_hat, v = estimate(net, parts, n, x, source_h, label, sampling.guidance)
            if sampling.clip:
                x0_hat = rep.clamp(x0_hat, *value_range)
            z = rep.encode_noise(noise(k + 1)) if path.draws(m, sampling.method) else None
            x = step(k, x, x0_hat, z, v)
            if known is not None:
                mask, image = known
                clean = rep.encode(image)
                if m >= 0:
                    noisy = math.isfinite(path.snr(m))
                    z = rep.encode_noise(noise(len(grid) + k)) if noisy else None
                    clean = path.sample(m, clean, x1, z)
                x = rep.encode(torch.where(mask.bool(), rep.decode(x), rep.decode(clean)))
            if watch is not None:
                watch(k, m, rep.decode(x), rep.decode(x0_hat))
        return rep.decode(x)


def estimate(
    net: Net, parts: Parts, n: int, x: Tensor, source_h: Tensor | None, label: Tensor | None, guidance: float
) -> tuple[Tensor, Tensor | None]:
    """x0_hat at x_n, and the learned variances or None; guided by the difference that the condition makes."""
    out, v = parts.ask(net, n, x, source_h, label)
    x0_hat = parts.path.to_x0(n, x, out)
    if guidance != 1.0:
        out, _ = parts.ask(net, n, x, *parts.condition.null(source_h, label))
        free = parts.path.to_x0(n, x, out)
        x0_hat = free + guidance * (x0_hat - free)
    return x0_hat, v
