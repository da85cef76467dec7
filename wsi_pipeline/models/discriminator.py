"""Diffusion-FFPE's discriminator: a small learning head on features of a frozen network, at three depths.

Source: Kumari et al., "Ensembling Off-the-shelf Models for GAN Training", CVPR 2022 (the multi-level head);
Miyato et al., "Spectral Normalization for GANs", ICLR 2018; Zhang, "Making Convolutional Networks
Shift-Invariant Again", ICML 2019 (blur before a stride). Sides of the published grid in brackets:

    maps 0, 1   blur [14 -> 15], 3x3 stride 2 [-> 7], LeakyReLU, blur [-> 6], 1x1 stride 2 [-> 3]
    vector      linear, LeakyReLU, linear

Why spectral normalisation is written here: torch deprecates the variant whose state (``weight_orig``,
``weight_u``, ``weight_v``) published heads have. One power iteration in each forward pass of training mode,
none in evaluation mode. Names of parameters and buffers are the published ones: files fit both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.models.diff_augment import POLICY, Draws, augment, check_policy

__all__ = ["MIN_GRID", "Discriminator", "MultilevelHead", "SpectralLayer", "multilevel_loss"]

MIN_GRID = 4
"""Smallest side of a feature map that leaves one logit."""

_EPSILON = 1e-12
_SLOPE = 0.2


class SpectralLayer(nn.Module):
    """A convolution, or for a matrix a linear layer, whose weight is divided by its largest singular value.

    ``shape``: of the weight, [out, in, k, k] or [out, in]. sigma = u^T W v with W as a matrix [out, rest].
    """

    def __init__(self, shape: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        outputs, inputs = shape[0], math.prod(shape[1:])
        self.stride = stride
        self.bias = nn.Parameter(torch.empty(outputs))
        self.weight_orig = nn.Parameter(torch.empty(*shape))
        self.register_buffer("weight_u", F.normalize(torch.randn(outputs), dim=0, eps=_EPSILON))
        self.register_buffer("weight_v", F.normalize(torch.randn(inputs), dim=0, eps=_EPSILON))
        # torch's own defaults of both kinds of layers.
        nn.init.kaiming_uniform_(self.weight_orig, a=5**0.5)
        nn.init.uniform_(self.bias, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()
        if weight.dim() == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, stride=self.stride)

    def weight(self) -> Tensor:
        """The normalised weight; in training mode after one power iteration, which moves u and v."""
        matrix = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                self._iterate(matrix)
        # Copies: a second forward pass moves the buffers before the first one's backward pass.
        u, v = self.weight_u.clone(), self.weight_v.clone()
        return self.weight_orig / torch.dot(u, torch.mv(matrix, v))

    def _iterate(self, matrix: Tensor) -> None:
        self.weight_v.copy_(F.normalize(torch.mv(matrix.t(), self.weight_u), dim=0, eps=_EPSILON))
        self.weight_u.copy_(F.normalize(torch.mv(matrix, self.weight_v), dim=0, eps=_EPSILON))


class _Blur(nn.Module):
    """The binomial filter [1, 3, 3, 1] x [1, 3, 3, 1] / 64 on each channel, zeros outside.

    A side grows by ``2 pad - 3``.
    """

    def __init__(self, channels: int, pad: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(taps, taps) / 64.0
        self.pad = pad
        self.register_buffer("filt", kernel.expand(channels, 1, 4, 4).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filt, padding=self.pad, groups=x.shape[1])


class MultilevelHead(nn.Module):
    """Logits of two feature maps and a vector.

    ``widths``: channels of the three levels, ``hidden``: channels inside. With 768 and 128: 1,868,547
    parameters, the published head.
    """

    def __init__(self, widths: tuple[int, int, int], hidden: int = 128) -> None:
        super().__init__()
        maps = [
            nn.Sequential(
                _Blur(width, pad=2),
                SpectralLayer((hidden, width, 3, 3), stride=2),
                nn.LeakyReLU(_SLOPE),
                _Blur(hidden, pad=1),
                SpectralLayer((1, hidden, 1, 1), stride=2),
            )
            for width in widths[:2]
        ]
        vector = nn.Sequential(SpectralLayer((hidden, widths[2])), nn.LeakyReLU(_SLOPE))
        self.decoder = nn.ModuleList([*maps, vector])
        self.out = SpectralLayer((1, hidden))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[B, C, h, w], [B, C, h, w], [B, C] -> logits [B, h', w'], [B, h', w'], [B, 1]; h' = h // 2 // 2.

        Raises ValueError for maps smaller than ``MIN_GRID``.
        """
        logits = []
        for block, level in zip(self.decoder[:2], features[:2], strict=True):
            height, width = level.shape[-2:]
            if min(height, width) < MIN_GRID:
                raise ValueError(f"feature map of {height} x {width}: the head needs {MIN_GRID} x {MIN_GRID}")
            logits.append(block(level).squeeze(1))
        return [*logits, self.out(self.decoder[2](features[2]))]


def multilevel_loss(logits: Sequence[Tensor], target: float) -> Tensor:
    """Binary cross-entropy with ``target`` (1 real, 0 made): means of the levels' logits, summed; [B]."""
    losses = [
        F.binary_cross_entropy_with_logits(level, torch.full_like(level, target), reduction="none")
        .flatten(1)
        .mean(dim=1)
        for level in logits
    ]
    return torch.stack(losses).sum(dim=0)


class Discriminator(nn.Module):
    """DiffAugment, a frozen backbone, and the head.

    ``policy``: parts of DiffAugment. The backbone moves with ``to`` and may serve several discriminators. It
    is no part of parameters, buffers or state, and training mode does not reach it: nothing of it learns, and
    a checkpoint does not hold it (licences of most pathology networks forbid that).
    """

    def __init__(self, backbone: nn.Module, head: MultilevelHead, policy: Sequence[str] = POLICY) -> None:
        super().__init__()
        check_policy(policy)
        self.policy = tuple(policy)
        self.decoder = nn.ModuleList([head])
        # Past nn.Module's register, see above.
        self.__dict__["backbone"] = backbone.eval().requires_grad_(False)

    def forward(self, x: Tensor, draws: Draws | None) -> list[Tensor]:
        """Logits of images [B, 3, H, W] in [-1, 1]; ``draws``: None does not augment.

        Gradients reach the images; in training mode each pass moves the head's spectral norms.
        """
        if draws is not None:
            x = augment(x, draws, self.policy)
        logits: list[Tensor] = self.decoder[0](self.backbone(x))
        return logits

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Discriminator:
        super()._apply(fn, recurse)
        self.backbone._apply(fn, recurse)
        return self
