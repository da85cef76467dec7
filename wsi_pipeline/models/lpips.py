"""LPIPS: how different two images look, as distances of VGG16 features with learned weights.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
version 0.1. With f_l the features after ReLU 1_2, 2_2, 3_3, 4_3, 5_3 of VGG16, w_l >= 0 a channel's weight:

    d(x, y) = sum over l of  mean over pixels of  sum over channels of  w_l (n(f_l(x)) - n(f_l(y)))^2
    n(f)    = f / sqrt(sum over channels of f^2 + epsilon)

Why the epsilon is inside of the root: on flat background all channels of a tap can be 0, where a bare root
has no derivative (the published program's NaN is hidden by the ReLU before it, as torch computes that today).
It changes distances by less than 1e-6.

The heads (``lpips_vgg_v01.safetensors``, 6 kB, BSD-2-Clause, notice in its metadata) come with the package.
VGG16's 0.5 GB are the user's file, or what torchvision left in torch's cache; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.checkpoint_file import few, read_checkpoint
from wsi_pipeline.models.tensor_file import StoredTensors, read_header

__all__ = ["VGG16_FILE", "VGG16_URL", "Lpips", "make_lpips"]

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's 3x3 convolutions; a stage ends in a tap, and 2x2 maxima lie between stages."""

_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)
_EPSILON = 1e-10
_HEADS = Path(__file__).with_name("lpips_vgg_v01.safetensors")
_REMEDY = (
    f"download {VGG16_URL} and name it as objective.adversarial.lpips_vgg, or train without: "
    "objective.adversarial.lpips=false"
)


class Lpips(nn.Module):
    """The distance; frozen, float32, in evaluation mode.

    ``vgg_state``: ``features.<i>.weight`` and ``.bias`` under torchvision's names (others are ignored);
    ``heads_state``: ``lin<l>.model.1.weight`` [1, C, 1, 1]; ``sources``: where the two come from, for errors.
    Raises CheckpointError where one does not fit.
    """

    def __init__(
        self,
        vgg_state: Mapping[str, Tensor],
        heads_state: Mapping[str, Tensor],
        sources: tuple[object, object] = ("VGG16", "heads"),
    ) -> None:
        super().__init__()
        self.features = _Vgg16()
        self.heads = nn.ParameterList([torch.empty(1, stage[-1], 1, 1) for stage in _STAGES])
        vgg = {f"features.{name}": tensor for name, tensor in self.features.named_parameters()}
        heads = {f"lin{level}.model.1.weight": tensor for level, tensor in enumerate(self.heads)}
        _fill(vgg, vgg_state, f"{sources[0]}: is not VGG16 as torchvision has it", _REMEDY)
        _fill(heads, heads_state, f"{sources[1]}: holds no heads of LPIPS for VGG16", "take those of v0.1")
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [B] of images [B, 3, H, W] in [-1, 1]; sides of at least 16 px."""
        return self.per_layer(x, y).sum(dim=0)

    def per_layer(self, x: Tensor, y: Tensor) -> Tensor:
        """The five terms of the distances, [5, B]."""
        # One after the other: the image without a gradient keeps no activations.
        pairs = zip(self._taps(x), self._taps(y), self.heads, strict=True)
        return torch.stack([(w * (a - b) ** 2).sum(dim=1).mean(dim=(1, 2)) for a, b, w in pairs])

    def _taps(self, x: Tensor) -> list[Tensor]:
        taps = self.features((x.float() - self.mean) / self.std)
        return [tap / (tap.square().sum(dim=1, keepdim=True) + _EPSILON).sqrt() for tap in taps]


class _Vgg16(nn.Module):
    """VGG16's convolutions (Simonyan and Zisserman, ICLR 2015), numbered as in torchvision's ``features``."""

    def __init__(self) -> None:
        super().__init__()
        place, inputs = 0, 3
        for stage in _STAGES:
            for outputs in stage:
                self.add_module(str(place), nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1))
                place, inputs = place + 2, outputs  # its ReLU has a number of its own
            place += 1  # so has the maximum

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> the last activations of each stage, [B, 64, H, W] ... [B, 512, H/16, W/16]."""
        convolutions = iter(self.children())
        taps: list[Tensor] = []
        for stage in _STAGES:
            x = F.max_pool2d(taps[-1], 2) if taps else x
            for _ in stage:
                x = next(convolutions)(x).relu_()
            taps.append(x)
        return taps


def make_lpips(vgg: Path | None = None, heads: Path | None = None) -> Lpips:
    """LPIPS with VGG16's weights from a file, or else from torch's cache (``TORCH_HOME``); on the CPU.

    ``heads``: another file of linear heads. Raises CheckpointError that names the file, its address and the
    setting that does without LPIPS.
    """
    if vgg is None:
        vgg = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    if not vgg.is_file():
        raise CheckpointError(f"{vgg}: is not there, LPIPS needs VGG16's weights; {_REMEDY}")
    heads = heads or _HEADS
    return Lpips(_read(vgg), _read(heads), (vgg, heads))


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return StoredTensors({name: (path, name) for name in read_header(path, _REMEDY).shapes})
    return read_checkpoint(path)


def _fill(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], problem: str, remedy: str) -> None:
    def fits(name: str) -> bool:
        return isinstance(state.get(name), Tensor) and state[name].shape == wanted[name].shape

    if wrong := [name for name in wanted if not fits(name)]:
        raise CheckpointError(f"{problem}, {len(wrong)} tensors differ ({few(wrong)}); {remedy}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(state[name])
