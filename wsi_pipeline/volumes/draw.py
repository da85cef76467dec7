"""Images and volumes from a translator's weights: drawn from noise and a class, or from source volumes.

Each image is a function of (seed, number) alone: its noise has a key of its own (``core.noise``), and on a
CPU images are drawn one by one, so neither batch nor count changes a bit. On a GPU a batch may change the
last grey level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wsi_pipeline.core.geometry import Region
from wsi_pipeline.core.noise import lattice_normal, noise_key
from wsi_pipeline.errors import ConfigError, OutputExistsError
from wsi_pipeline.translators.bundle import TranslatorSpec, build_translator, load_translator
from wsi_pipeline.translators.parts import Parts, make_parts
from wsi_pipeline.translators.sampler import draw
from wsi_pipeline.translators.settings import SamplingConfig
from wsi_pipeline.volumes.files import Volume, read_volume, write_volume

__all__ = ["Drawer", "draw_images", "open_drawer", "translate_file", "translate_volume"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawer:
    """A translator ready to draw. ``labels``: numbers of the classes that images get in turn, empty: none."""

    spec: TranslatorSpec
    net: nn.Module
    parts: Parts
    sampling: SamplingConfig
    labels: tuple[int, ...]
    device: torch.device

    @property
    def multiples(self) -> tuple[int, int, int]:
        """What sizes along z, y, x have to be multiples of."""
        network, axes = self.spec.network, self.parts.representation.axes
        deep = network.multiple if network.halve_depth else 1
        halved = self.parts.representation.alignment
        return deep * (halved if "z" in axes else 1), self.spec.multiple, self.spec.multiple


def open_drawer(
    weights: Path, labels: Sequence[str], nfe: int | None, guidance: float | None, device: torch.device
) -> Drawer:
    """Load weights. ``labels``: names or numbers of classes, empty: all of them. ConfigError for an unknown
    class or a translator without steps, CheckpointError for a file that is none."""
    facts, tensors = load_translator(weights)
    spec = facts.spec
    if spec.diffusion is None:
        raise ConfigError(f"{weights}: translates at once and draws nothing; use `wsi-pipeline convert`")
    classes = spec.diffusion.condition.classes
    names = spec.classes or tuple(str(number) for number in range(classes))
    numbers = {name: number for number, name in enumerate(names)}
    for label in labels:
        if label not in numbers and not (label.isdecimal() and int(label) < classes):
            raise ConfigError(f"--label {label}: {weights} knows {', '.join(names) or 'no classes'}")
    chosen = [numbers[label] if label in numbers else int(label) for label in labels] or list(range(classes))
    guided = spec.sampling.guidance if guidance is None else guidance
    sampling = replace(spec.sampling, nfe=nfe or spec.sampling.nfe, guidance=guided)
    net, parts = build_translator(spec, tensors, device), make_parts(spec.diffusion)
    return Drawer(spec=spec, net=net, parts=parts, sampling=sampling, labels=tuple(chosen), device=device)


def draw_images(drawer: Drawer, numbers: Sequence[int], seed: int, depth: int | None = None) -> Tensor:
    """Images of these numbers, [B, C, H, W], or volumes of ``depth`` planes, [B, C, D, H, W], in [0, 1].

    ConfigError for a translator of source images, or a depth that does not fit.
    """
    spec = drawer.spec
    if spec.translates:
        how = "--source VOLUME" if spec.axes == "zyx" else "`wsi-pipeline convert`"
        raise ConfigError(f"these weights follow a source image; use {how}")
    size = (depth or spec.tile, spec.tile, spec.tile)
    if spec.axes == "yx":
        return _drawn(drawer, size[1:], numbers, seed, None)
    if any(np.mod(size, drawer.multiples)):
        raise ConfigError(f"--depth: {size} is no multiple of {drawer.multiples}")
    return _drawn(drawer, size, numbers, seed, None)


def translate_volume(drawer: Drawer, sources: Sequence[Volume], seed: int, number: int = 0) -> Volume:
    """The volume that the sources, in the order of the recipe, become; values in [0, 1], sizes as theirs.

    Sources are brought to [0, 1] (``_unit``), filled up with 0 to the network's multiples and cut again. For
    values in [0, 1] (cWDM) what is 0 in the first source stays 0. ConfigError for sources of several shapes,
    too many or few, or sections too far apart.
    """
    spec, first, config = drawer.spec, sources[0], drawer.parts.condition.config
    shapes = {volume.values_CDHW.shape for volume in sources}
    fits = len(sources) == config.sources and len(shapes) == 1 and first.values_CDHW.shape[0] == spec.channels
    if spec.axes != "zyx" or not spec.translates or not fits:
        raise ConfigError(
            f"--source: {len(sources)} of shape {sorted(shapes)}: these weights take {config.sources} images "
            f"of one shape, axes {spec.axes}, {spec.channels} channels, and "
            f"{'follow them' if spec.translates else 'follow no source'}"
        )
    drawer.parts.representation.config.check_spacing(first.um[0], first.um[1])
    unit_CDHW = np.concatenate([_unit(volume.values_CDHW) for volume in sources])
    size = unit_CDHW.shape[1:]
    fill = [(0, -side % multiple) for side, multiple in zip(size, drawer.multiples, strict=True)]
    low, high = spec.value_range
    source = torch.from_numpy(np.pad(unit_CDHW, [(0, 0), *fill]) * (high - low) + low)[None]
    made = _drawn(drawer, source.shape[2:], [number], seed, source.to(drawer.device))
    values_CDHW = made[0, :, : size[0], : size[1], : size[2]].numpy()
    if low == 0.0:
        values_CDHW = np.where(unit_CDHW[: spec.channels] == 0, np.float32(0), values_CDHW)
    return Volume(values_CDHW=values_CDHW, um=first.um, affine=first.affine)


def translate_file(drawer: Drawer, sources: Sequence[Path], out: Path, seed: int) -> None:
    """``translate_volume`` from file to file; OutputExistsError before anything is read."""
    if out.exists():
        raise OutputExistsError(f"{out}: is there already; choose another name", path=out)
    write_volume(out, translate_volume(drawer, [read_volume(path) for path in sources], seed))


def _drawn(
    drawer: Drawer, size: Sequence[int], numbers: Sequence[int], seed: int, source: Tensor | None
) -> Tensor:
    keys = [noise_key(seed, f"sample {number}") for number in numbers]
    plane = Region(0, 0, *size[-2:])

    def noise(k: int) -> Tensor:
        depth = size[0] if len(size) == 3 else 1
        planes_BZCHW = [
            [lattice_normal(plane, key=key, channels=drawer.spec.channels, step=k, z=z) for z in range(depth)]
            for key in keys
        ]
        drawn_BCZHW = np.array(planes_BZCHW).swapaxes(1, 2)
        return torch.from_numpy(drawn_BCZHW if len(size) == 3 else drawn_BCZHW[:, :, 0]).to(drawer.device)

    labels = [drawer.labels[number % len(drawer.labels)] for number in numbers] if drawer.labels else None
    label = None if labels is None else torch.tensor(labels, device=drawer.device)
    low, high = drawer.spec.value_range
    settings = (drawer.net, drawer.parts, drawer.sampling)
    made = draw(*settings, source=source, label=label, noise=noise, value_range=(low, high))
    return ((made.float() - low) / (high - low)).clamp(0.0, 1.0).cpu()


def _unit(values_CDHW: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Values in [0, 1], float32: grey levels by 255, prepared values as they are, others (intensities of a
    scanner) as WDM does, from the 0.1 % to the 99.9 % quantile."""
    low, high = np.quantile(values_CDHW, (0.001, 0.999))
    if values_CDHW.dtype == np.uint8 or (values_CDHW.min() >= 0 and values_CDHW.max() <= 1):
        low, high = 0.0, 255.0 if values_CDHW.dtype == np.uint8 else 1.0
    unit_CDHW = ((values_CDHW - np.float32(low)) / np.float32(max(high - low, 1e-12))).clip(0, 1)
    return np.asarray(unit_CDHW, np.float32)
