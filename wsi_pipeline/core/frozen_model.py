"""The ranges of the frozen-section model: one dataclass for each family of artefacts, lengths in micrometres.

Each docstring says what happens to tissue and what the numbers mean; ``core.frozen`` applies them. What the
artefacts are is textbook: S. R. Peters (ed.), "A Practical Guide to Frozen Section Technique", Springer,
2010; S. A. Taqi et al., "A review of artifacts in histopathology", J. Oral Maxillofac. Pathol. 22, 2018. They
give few numbers, so where a docstring names no source a range is our choice: made by looking at real frozen
sections (TCGA BS/TS tiles at 0.5 um/px, her2st) beside simulated ones, by checking that power spectra,
colours and densities of haematoxylin overlap theirs, and fitted to no score of any network.

Probabilities are those that a slide shows the artefact at all. A preset is a set of these values in a config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TypeAlias

from wsi_pipeline.errors import ConfigError

__all__ = ["Chromatin", "FrozenModel", "Ice", "Light", "Range", "Section", "Stain"]

Range: TypeAlias = tuple[float, float]
"""Lowest and highest value; drawn evenly between them."""

MAX_SEVERITY = 2.0

_LENGTHS = ("size_um", "region_um", "edge_um", "uneven_um", "chatter_um", "focus_um", "stretch")
"""What fields and periods are divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chromatin:
    """Nuclei swell, and their chromatin smudges: ice breaks membranes before any fixative sets them.

    Frozen nuclei look larger, flat and dark, without the granules, clear centres and sharp membranes of
    paraffin. ``flat``: share of chromatin contrast that is lost to the mean of the nucleus around
    (``texture_um``, standard deviation); ``pallor``: factor on a nucleus' haematoxylin, below 1 pale, above 1
    hyperchromatic; ``swell_um``: by which radii grow; ``leak``: share of haematoxylin that lies in the
    cytoplasm instead (within ``leak_um``); ``smudge_um``: blur, all around; ``smear_um``: path along which
    the blade drags.
    """

    probability: float = 1.0
    smudge_um: Range = (0.1, 0.4)
    smear_um: Range = (0.0, 0.9)
    swell_um: Range = (0.0, 0.9)
    flat: Range = (0.3, 0.95)
    pallor: Range = (0.9, 1.6)
    leak: Range = (0.0, 0.2)
    leak_um: float = 4.0
    texture_um: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ice:
    """Water freezes to crystals, which leave clear holes: the Swiss cheese of slowly frozen tissue.

    The slower, the larger: vacuoles within the cytoplasm, clefts between cells. Crystals grow where water is
    free, and push cells aside. Holes are where a random field exceeds a threshold; nuclei and the cytoplasm
    next to them lower the field (``spare``, in standard deviations), a slow field of ``region_um`` raises it
    where freezing was slow (``cluster``). ``share``: of area, where nothing lowers or raises it; ``size_um``:
    width of the field's grains, ``stretch``: their length by it (1 round, above 2 leaves and needles).
    Density falls to ``1 - depth`` of what it was over a border of ``edge_um``; what was pushed aside
    darkens the rim (``rim``, gain of density). ``fine_*``: a second population within the cytoplasm, smaller
    than the section is thick and so only partly clear; it also makes the borders of large holes ragged.
    """

    probability: float = 0.9
    share: Range = (0.0, 0.35)
    size_um: Range = (3.5, 11.0)
    stretch: Range = (1.0, 2.5)
    spare: Range = (0.6, 1.9)
    cluster: Range = (0.2, 0.7)
    region_um: float = 250.0
    depth: Range = (0.85, 1.0)
    edge_um: Range = (0.7, 1.6)
    rim: Range = (0.0, 0.25)
    fine_share: Range = (0.0, 0.25)
    fine_size_um: Range = (1.2, 2.8)
    fine_depth: Range = (0.15, 0.7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Cryosections are thicker and less even than paraffin ones: 5 to 10 um rather than 3 to 5 (Peters).

    ``gain``: mean thickness by the paraffin section's; near 1, because how strong dyes come out is said
    in ``Stain``; ``uneven``: relative deviation over ``uneven_um``; ``chatter``: relative amplitude of
    bands across the blade's path, ``chatter_um`` apart, from a block that is too cold and a blade that
    vibrates; ``compression``: share by which the section is shortened, which thickens it by
    ``1 / (1 - compression)``.
    """

    probability: float = 1.0
    gain: Range = (0.9, 1.25)
    uneven: Range = (0.0, 0.12)
    uneven_um: float = 150.0
    chatter: Range = (0.0, 0.08)
    chatter_um: Range = (15.0, 60.0)
    chatter_probability: float = 0.3
    compression: Range = (0.0, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stain:
    """Rapid staining: other hues, other strengths, and a glass that is not white.

    ``haematoxylin``: optical density that dense parts of the picture shall reach, whatever they had: a
    laboratory's frozen protocol knows nothing of its paraffin protocol (real frozen tiles: 1.5 to 4).
    ``eosin``: its density by haematoxylin's (real: 0.1 to 0.9); ``wash_out``: chance that eosin is nearly
    gone, with ``washed_eosin`` instead. ``turn_deg``: deviation of each dye's direction in density space, any
    way; ``blue``: of haematoxylin, with its own probability, towards a dye that absorbs red only, as rapid
    haematoxylins do. ``veil``: density of dye that stays on the glass; ``glass``: brightness by the source's;
    ``pink``: share of green it lacks.
    """

    probability: float = 1.0
    haematoxylin: Range = (1.2, 3.3)
    eosin: Range = (0.2, 0.75)
    turn_deg: Range = (0.0, 6.0)
    blue: Range = (0.0, 0.6)
    blue_probability: float = 0.3
    wash_out: float = 0.15
    washed_eosin: Range = (0.05, 0.2)
    veil: Range = (0.0, 0.06)
    glass: Range = (0.95, 1.03)
    pink: Range = (-0.005, 0.04)


@dataclass(frozen=True, slots=True, kw_only=True)
class Light:
    """The microscope: out of focus in parts, haze from above and below the focal plane, noise, JPEG.

    ``blur_um``: standard deviation of the point spread in the worst part of the picture, ``blur_least``: of
    it in the best part; a slow field of ``focus_um`` says where. ``haze``: share of light that was blurred
    by ``haze_um``, because a section thicker than the depth of field (1 um or so at 20x) is never in focus as
    a whole. ``shot``, ``read``: standard deviations of noise in grey levels, at white and everywhere;
    ``quality``: of JPEG, which most scanners apply.
    """

    probability: float = 1.0
    blur_um: Range = (0.0, 0.5)
    blur_least: Range = (0.2, 0.8)
    focus_um: float = 200.0
    haze: Range = (0.0, 0.15)
    haze_um: Range = (1.5, 4.0)
    shot: Range = (0.0, 2.0)
    read: Range = (0.0, 1.5)
    quality: Range = (60.0, 95.0)
    jpeg_probability: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenModel:
    """Ranges of every artefact; ``severity`` 0 is the identity, 1 applies what was drawn, 2 twice that.

    Raises ConfigError for a range that descends, a negative length or a probability that is none.
    """

    severity: float = 1.0
    chromatin: Chromatin = field(default_factory=Chromatin)
    ice: Ice = field(default_factory=Ice)
    section: Section = field(default_factory=Section)
    stain: Stain = field(default_factory=Stain)
    light: Light = field(default_factory=Light)

    def __post_init__(self) -> None:
        if not 0.0 <= self.severity <= MAX_SEVERITY:
            raise ConfigError(f"frozen.severity: {self.severity} is not between 0 and {MAX_SEVERITY:g}")
        for part in ("chromatin", "ice", "section", "stain", "light"):
            for entry in fields(getattr(self, part)):
                _check(f"frozen.{part}.{entry.name}", getattr(getattr(self, part), entry.name))


def _check(name: str, value: float | Range) -> None:
    low, high = value if isinstance(value, tuple | list) else (value, value)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ConfigError(f"{name}: {value} is no range; give the lower number first")
    if low < 0.0 and not name.endswith("pink"):
        raise ConfigError(f"{name}: {value} is negative; give 0 or more")
    if low == 0.0 and name.endswith(_LENGTHS):
        raise ConfigError(f"{name}: {value} is no length; give micrometres above 0")
    if name.endswith(("probability", "wash_out")) and high > 1.0:
        raise ConfigError(f"{name}: {value} is no probability; give 0 to 1")
