"""What a recipe says about a diffusion-like translator, and what the theory refuses. Imports no torch.

    x_n = a(n) x0 + b(n) x1 + s(n) z        x0: target image, x1: source image, z: standard normal

A system is four choices: path (a, b, s and what the network predicts), representation (pixels or Haar
coefficients), condition (nothing, class label, source image beside x_n) and weight of the loss. I2SB (Liu et
al., ICML 2023), DDPM with P2 weights (Choi et al., CVPR 2022), WDM and cWDM (Friedrich et al., 2024) are
values of these classes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from wsi_pipeline.errors import ConfigError

__all__ = [
    "ConditionConfig",
    "DiffusionConfig",
    "PathConfig",
    "RepresentationConfig",
    "SamplingConfig",
    "WeightConfig",
]

Axis: TypeAlias = Literal["z", "y", "x"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathConfig:
    """``kind``: ``vp`` (Ho et al., 2020) or ``bridge`` (I2SB); ``steps``: of the grid, 0 is the clean side.

    Of ``vp``: ``schedule``, ``prediction`` (what the network returns), ``variance`` of the reverse step
    (``learned_range``: the network returns it too, in as many channels again). Of ``bridge``: ``beta_max``,
    ``beta_min``; ``ode``: without noise (optimal transport); ``parity``: sums and end point as published, in
    place of exact ones.
    """

    kind: Literal["vp", "bridge"] = "bridge"
    steps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    beta_max: float = 0.3
    beta_min: float = 1e-4
    ode: bool = False
    parity: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.steps <= 100_000 or self.steps % 2:
            raise ConfigError(f"path.steps: {self.steps} has to be even, 2 to 100,000")
        if not 0 < self.beta_min < self.beta_max:
            raise ConfigError(
                f"path: beta_min {self.beta_min} and beta_max {self.beta_max} have to rise from 0"
            )
        if self.variance == "learned_range" and self.prediction != "epsilon":
            raise ConfigError("path.variance: learned_range goes with prediction epsilon")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepresentationConfig:
    """``kind``: ``identity`` (pixels) or ``haar``; ``axes`` that it halves, ``levels`` times.

    ``ll_scale``: divisor of the lowest band (None: sqrt(2) for each axis and level, which keeps the range of
    pixels; published: 3 for volumes); ``band_std``: divisors of all channels in place of it, in the order of
    the channels (the standard deviations of the training set); ``forced``: allow z as an axis of stacks whose
    sections lie further apart than three pixels.
    """

    kind: Literal["identity", "haar"] = "identity"
    axes: tuple[Axis, ...] = ("y", "x")
    levels: int = 1
    ll_scale: float | None = None
    band_std: tuple[float, ...] | None = None
    forced: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 4:
            raise ConfigError(f"representation.levels: {self.levels} is not 1 to 4")
        if not self.axes or list(self.axes) != [axis for axis in ("z", "y", "x") if axis in self.axes]:
            raise ConfigError(
                f"representation.axes: {list(self.axes)} has to be some of z, y, x, in this order"
            )
        divisors = (*(self.band_std or ()), *([] if self.ll_scale is None else [self.ll_scale]))
        if any(value <= 0 for value in divisors):
            raise ConfigError("representation: ll_scale and band_std have to be above 0")

    def check_spacing(self, z_um: float, y_um: float) -> None:
        """Refuse to mix sections that are further apart than three pixels: they show different tissue."""
        if "z" in self.axes and self.kind == "haar" and z_um > 3 * y_um and not self.forced:
            raise ConfigError(
                f"representation.axes: sections lie {z_um:g} um apart and pixels {y_um:g}; halving z would "
                "mix different tissue. Take axes [y, x], or set representation.forced=true"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionConfig:
    """``concat``: the source image stands beside x_n; ``sources``: how many images it is made of;
    ``classes``: number of labels (0: none); ``drop``: share of training samples without condition, for
    guidance."""

    concat: bool = False
    sources: int = 1
    classes: int = 0
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 0 or self.sources < 1 or not 0.0 <= self.drop < 1.0:
            raise ConfigError("condition: classes is 0 or more, sources 1 or more, drop in [0, 1)")
        if self.drop and not (self.classes or self.concat):
            raise ConfigError("condition.drop: there is no condition to drop; set classes or concat")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightConfig:
    """``kind``: ``uniform``; ``p2``: 1 / (k + SNR)^gamma on the epsilon loss, converted for other
    predictions; ``bands``: one weight a Haar band: ``equal`` (published), ``parseval`` (the loss of pixels)
    or a list. ``vlb``: weight of the variational bound, which trains learned variances."""

    kind: Literal["uniform", "p2", "bands"] = "uniform"
    gamma: float = 1.0
    k: float = 1.0
    bands: Literal["equal", "parseval"] | tuple[float, ...] = "parseval"
    vlb: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """``nfe``: calls of the network; ``method`` of ``vp`` paths; ``clip``: keep every estimate of the image
    in its range; ``guidance``: of a dropped condition (1: none)."""

    nfe: int = 10
    method: Literal["ancestral", "ddim", "dpmsolver"] = "ancestral"
    clip: bool = True
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.nfe < 1 or self.guidance < 0:
            raise ConfigError("sampling: nfe is 1 or more, guidance 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig:
    """The first three choices; the weight belongs to training alone."""

    path: PathConfig = field(default_factory=PathConfig)
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)

    def __post_init__(self) -> None:
        bridge = self.path.kind == "bridge"
        if bridge and self.path.ode and self.condition.concat:
            raise ConfigError(
                "path.ode with condition.concat: collapses to the conditional mean at every number of steps "
                "(variance 0.49 in place of 1 on a Gaussian pair): a slow regression. Set path.ode=false, or "
                "condition.concat=false"
            )
        if not bridge and self.path.variance == "learned_range" and self.representation.kind == "haar":
            raise ConfigError("path.variance: learned_range counts grey levels; with haar take fixed_large")

    @property
    def translates(self) -> bool:
        """Whether the output follows a source image; else it is drawn from noise (and a label) alone."""
        return self.path.kind == "bridge" or self.condition.concat

    def check_translates(self, what: str) -> None:
        """ConfigError where a slide shall be translated by something that sees no slide."""
        if not self.translates:
            raise ConfigError(
                f"{what}: draws tiles from noise and labels and sees no source image, so it cannot translate "
                "a slide; draw tiles with `wsi-pipeline sample`"
            )
