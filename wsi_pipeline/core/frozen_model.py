"""The ranges of the frozen-section model: one dataclass for each family of artefacts, lengths in micrometres.

Each docstring says what happens to tissue and what the numbers mean; ``core.frozen`` applies them. Values are
our choice, made by looking at real frozen sections (TCGA BS/TS tiles, her2st) beside simulated ones, and
fitted to no score; where a source gives a number, the class says so. What the artefacts are is textbook:
S. A. Taqi et al., "A review of artifacts in histopathology", J. Oral Maxillofac. Pathol. 22, 2018;
S. Chatterjee, "Artefacts in histopathology", J. Oral Maxillofac. Pathol. 18, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["Chromatin", "FrozenModel", "Ice", "Light", "Range", "Section", "Stain"]

Range: TypeAlias = tuple[float, float]
"""Lowest and highest value; drawn evenly between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chromatin:
    """Nuclei swell, and their chromatin smudges: freezing breaks membranes before any fixative sets them.

    Frozen nuclei look larger, flat and dark, without the fine granules, clear centres and sharp membranes of
    paraffin. Haematoxylin inside nuclei is averaged over ``smudge_um`` (standard deviation), dragged over
    ``smear_um`` along the blade, spread outwards by ``swell_um``; ``flat`` is the share of chromatin contrast
    that is lost, ``pallor`` the factor on what lies above the background (1 keeps it), ``leak`` the share
    of haematoxylin that is found in the cytoplasm around (``leak_um``).
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
    """Water freezes to crystals and leaves clear holes: the Swiss cheese of slowly frozen tissue.

    The slower the freezing, the larger the crystals: from vacuoles within the cytoplasm to clefts of cell
    size. They grow where water is free, between cells and in cytoplasm, and push nuclei aside. Holes are
    where a random field exceeds a threshold; nuclei lower the field (``spare``, in standard deviations), a
    slow field of ``region_um`` raises it near the freezing front (``cluster``). ``size_um`` is the width of
    the grains, ``stretch`` their length by it (1 round, 4 needles and leaves), ``share`` the area of holes
    in tissue without nuclei. Inside, density falls to ``1 - depth`` of its value over a border of
    ``edge_um``; what was pushed aside darkens the rim (``rim``, gain of density). ``fine_*``: a second, finer
    population that makes cytoplasm foamy, thinner than the section and so only partly clear.
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
    """Cryosections are thicker and less even than paraffin ones: 5 to 10 um rather than 3 to 5.

    ``gain``: mean thickness by the paraffin section's, less than the ratio above, because the dyes' times are
    set to it; ``uneven``: relative deviation over ``uneven_um``; ``chatter``: relative amplitude of bands
    across the blade's path, ``chatter_um`` apart, from a vibrating blade; ``compression``: share by
    which the section is shortened, which thickens it by ``1 / (1 - compression)``.
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
    ``eosin``: its density by haematoxylin's (real: 0.1 to 0.9); ``wash_out``: chance that eosin is nearly gone,
    with ``washed_eosin`` instead.
    ``turn_deg``: deviation of each dye's direction in density space, any way; ``blue``: of haematoxylin, with
    its own probability, towards a dye that absorbs red only, as rapid haematoxylins do. ``veil``: density of
    dye that stays on the glass; ``glass``: brightness by the source's; ``pink``: share of green it lacks.
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

    ``blur_um``: standard deviation of the point spread in the picture's worst part, which a slow field of
    ``focus_um`` chooses; ``blur_least``: of it in the best part; ``haze``: share of light that was blurred
    by ``haze_um``, because a section thicker than the depth of field is never wholly in focus; ``shot``,
    ``read``: standard deviations of noise in grey levels, at white and everywhere; ``quality``: of JPEG.
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
    """Ranges of every artefact; ``severity`` 0 is the identity, 1 applies what was drawn, 2 twice that."""

    severity: float = 1.0
    chromatin: Chromatin = field(default_factory=Chromatin)
    ice: Ice = field(default_factory=Ice)
    section: Section = field(default_factory=Section)
    stain: Stain = field(default_factory=Stain)
    light: Light = field(default_factory=Light)
