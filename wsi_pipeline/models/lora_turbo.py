"""Diffusion-FFPE's generator: one step of an adapted SD-Turbo between two encoders and a decoder with skips.

Source: Zhang et al., "Leveraging Pre-trained Models for FF-to-FFPE Histopathological Image Translation", BIBM
2024; the translator around SD-Turbo is that of Parmar et al., img2img-turbo (2024). Equations:

    h, S_k   = Enc(x) + join(Enc'(cells(x)))          whole tile + its 4x4 cells, encoded apart, summed
    z        = 0.18215 (mean + exp(logvar / 2) n),    (mean, logvar) = quant_conv(h),  n = 0 for the mode
    eps      = UNet(z, t = 999, text)
    x0       = (z - sqrt(1 - abar) eps) / sqrt(abar)  abar = abar_999 = 0.00466
    y        = Dec(x0 / 0.18215; u_k + skip_conv_k(gamma S_k) before up block k), clamped to [-1, 1]

Why x0 is float32 whatever the networks are: an error of eps is multiplied by 14.6. Skips are return values,
so one network serves several threads and directions at once. Height and width are multiples of 32 (4 cells, 8
px a latent pixel) and need not be equal: cells are H/4 x W/4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "CELLS",
    "SIZE_MULTIPLE",
    "Features",
    "Posterior",
    "Translator",
    "cut_cells",
    "join_cells",
    "one_step",
]

CELLS = 4
"""Cells along each side of a tile."""

SIZE_MULTIPLE = 32
"""Height and width must be multiples of it: ``CELLS`` times the 8 px of a latent pixel."""

TIMESTEP = 999
LOGVAR_LIMITS = (-30.0, 20.0)


class Features(NamedTuple):
    """What an encoder sees: ``h`` [B, 2L, H/8, W/8] before ``quant_conv``, and four skip activations.

    ``skips``: what enters each down block, e.g. [B, 128, H, W] ... [B, 512, H/8, W/8].
    """

    h: Tensor
    skips: tuple[Tensor, ...]


class Posterior(NamedTuple):
    """Mean and log-variance of the latent, each [B, L, H/8, W/8] float32, not scaled."""

    mean: Tensor
    logvar: Tensor


def _alpha_bar() -> float:
    """Cumulated product of ``1 - beta`` over 1000 steps of SD-Turbo's scaled-linear schedule, in float32."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return float(torch.cumprod(1.0 - beta, dim=0)[TIMESTEP])


ALPHA_BAR = _alpha_bar()


def one_step(z: Tensor, eps: Tensor) -> Tensor:
    """x0 = (z - sqrt(1 - abar) eps) / sqrt(abar), in float32; clipping it would destroy the result."""
    return (z.float() - (1.0 - ALPHA_BAR) ** 0.5 * eps.float()) / ALPHA_BAR**0.5


def cut_cells(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [16 B, C, H/4, W/4]; cell (r, c) of sample b is item 16 b + 4 r + c."""
    b, channels, height, width = x.shape
    parts = x.reshape(b, channels, CELLS, height // CELLS, CELLS, width // CELLS)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // CELLS, width // CELLS)


def join_cells(cells: Tensor) -> Tensor:
    """The inverse of ``cut_cells``."""
    count, channels, height, width = cells.shape
    parts = cells.reshape(count // CELLS**2, CELLS, CELLS, channels, height, width)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, CELLS * height, CELLS * width)


class Translator(nn.Module):
    """One direction of the generator; two directions share ``unet``.

    ``encoder``, ``decoder``, ``quant_conv``, ``post_quant_conv``: of the global VAE, the decoder with
    ``skip_conv_1..4``; ``local_encoder``: for the cells, None for a generator that sees the whole tile only;
    ``text``: embedding [1, tokens, width]. Each part of a network may have its own floating-point type.
    ``recompute``: forget activations inside the blocks of the autoencoders and compute them again in the
    backward pass (gradient checkpointing); same numbers, less memory, for training only.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        quant_conv: nn.Module,
        post_quant_conv: nn.Module,
        local_encoder: nn.Module | None,
        text: Tensor,
        scaling_factor: float,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.encoder = encoder
        self.decoder = decoder
        self.quant_conv = quant_conv
        self.post_quant_conv = post_quant_conv
        self.local_encoder = local_encoder
        self.scaling_factor = scaling_factor
        self.recompute = False
        self.register_buffer("text", text, persistent=False)

    def forward(self, x: Tensor, noise: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """Translate tiles [B, 3, H, W] in [-1, 1]; returns float32 of the same shape, clamped to [-1, 1].

        ``noise``: standard normals [B, L, H/8, W/8] for the posterior, None for its mode; ``gamma``: strength
        of the skips. Raises ValueError for sides that are no multiples of ``SIZE_MULTIPLE``.
        """
        features = self.encode(x)
        z = self.latent(self.posterior(features.h), noise)
        x0 = one_step(z, self.denoise(z))
        return self.decode(x0, features.skips, gamma).clamp(-1.0, 1.0)

    def encode(self, x: Tensor) -> Features:
        """Features of the whole tile plus those of its cells."""
        height, width = x.shape[-2:]
        if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
            raise ValueError(f"{height} x {width}: height and width must be multiples of {SIZE_MULTIPLE}")
        whole = _encode(self.encoder, x, self.recompute)
        if self.local_encoder is None:
            return whole
        cells = _encode(self.local_encoder, cut_cells(x), self.recompute)
        skips = (a + join_cells(b) for a, b in zip(whole.skips, cells.skips, strict=True))
        return Features(whole.h + join_cells(cells.h), tuple(skips))

    def posterior(self, h: Tensor) -> Posterior:
        """``quant_conv`` once on the sum (its bias counts once)."""
        moments = _run(self.quant_conv, h).float()
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_LIMITS))

    def latent(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Scaled latent z: the mode, or a sample where ``noise`` is given; float32."""
        mean, logvar = posterior
        return (mean if noise is None else mean + torch.exp(0.5 * logvar) * noise) * self.scaling_factor

    def denoise(self, z: Tensor) -> Tensor:
        """The UNet's prediction of the noise in z at the last time step."""
        t = torch.full((z.shape[0],), TIMESTEP, dtype=torch.int64, device=z.device)
        dtype = _dtype(self.unet)
        text = self.text.to(dtype).expand(z.shape[0], -1, -1)
        return self.unet(z.to(dtype), t, encoder_hidden_states=text, return_dict=False)[0]

    def decode(self, x0: Tensor, skips: tuple[Tensor, ...], gamma: float = 1.0) -> Tensor:
        """Pixels [B, 3, H, W] float32, not clamped, from scaled latents and the encoder's skips."""
        decoder = self.decoder
        u = _run(decoder.conv_in, _run(self.post_quant_conv, x0 / self.scaling_factor))
        u = _run(decoder.mid_block, u)
        for k, (block, skip) in enumerate(zip(decoder.up_blocks, reversed(skips), strict=True), start=1):
            skipped = _run(getattr(decoder, f"skip_conv_{k}"), skip if gamma == 1.0 else skip * gamma)
            u = _run(block, u.to(skipped.dtype) + skipped, self.recompute)
        u = decoder.conv_act(_run(decoder.conv_norm_out, u))
        return _run(decoder.conv_out, u).float()


def _encode(encoder: Any, x: Tensor, recompute: bool = False) -> Features:
    u = _run(encoder.conv_in, x)
    skips = []
    for block in encoder.down_blocks:
        u = u.to(_dtype(block))
        skips.append(u)
        u = _run(block, u, recompute)
    u = _run(encoder.conv_norm_out, _run(encoder.mid_block, u))
    return Features(_run(encoder.conv_out, encoder.conv_act(u)), tuple(skips))


def _run(module: nn.Module, x: Tensor, recompute: bool = False) -> Tensor:
    """A part of a network in its own floating-point type; ``recompute``: without keeping activations."""
    x = x.to(_dtype(module))
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, x, use_reentrant=False)
    return module(x)


def _dtype(module: nn.Module) -> torch.dtype:
    """Floating-point type that a network takes; its first parameter's."""
    return next(module.parameters()).dtype
