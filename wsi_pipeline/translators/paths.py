"""Paths between source and target: x_n = a(n) x0 + b(n) x1 + s(n) z, and the jumps back to x0.

Why own tables and jumps: diffusers keeps its tables in float32 (1 - abar_0 = 1e-4 loses four digits, and the
first jump of a short chain multiplies errors by 157) and draws the noise of ancestral jumps itself, while a
slide needs the noise of its place. The DPM solver, which has a memory and draws nothing, is diffusers' own.

Here n and m are step numbers: n = 0 is the clean side, m = -1 the clean image itself. n is an int or an int64
tensor [B]; on the CPU it costs no wait for the accelerator. Tables are float64 on the CPU, cast at use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators.settings import PathConfig

__all__ = ["BridgePath", "Path", "Reverse", "Stepper", "VPPath", "at", "make_path", "spaced_steps"]

Step: TypeAlias = int | Tensor
Stepper: TypeAlias = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(k, x, x0_hat, z, v): jump k of a grid, from ``grid[k]`` to ``grid[k + 1]``; z: standard normals where
``Path.draws`` asks for them, v: the second half of the network's channels where the path is ``learned``."""


class Path(Protocol):
    """``from_noise``: runs start from noise, not from x1; ``learned``: the network returns variances too."""

    config: PathConfig
    steps: int
    from_noise: bool
    learned: bool

    def sample(self, n: Step, x0: Tensor, x1: Tensor | None, z: Tensor | None) -> Tensor:
        """x_n of a pair."""

    def target(self, n: Step, x_n: Tensor, x0: Tensor, z: Tensor | None) -> Tensor:
        """What the network has to return at x_n."""

    def to_x0(self, n: Step, x_n: Tensor, out: Tensor) -> Tensor:
        """The estimate of x0 that an output of the network stands for."""

    def snr(self, n: Step) -> Tensor:
        """(a / s)^2, float64; infinite without noise."""

    def time_input(self, n: Step) -> Tensor:
        """What the network is told of n, float32."""

    def grid(self, nfe: int, method: str = "ancestral") -> tuple[int, ...]:
        """``nfe`` + 1 descending step numbers; the last is the state that a run returns."""

    def start(self, x1: Tensor | None, z: Tensor | None) -> Tensor:
        """The first state of a run."""

    def draws(self, m: int, method: str = "ancestral") -> bool:
        """Whether a jump to m adds noise."""

    def stepper(self, grid: Sequence[int], method: str = "ancestral") -> Stepper:
        """The jumps of one run, to be called in order: a solver may remember the last ones."""


def make_path(config: PathConfig) -> Path:
    """The path of a recipe."""
    return BridgePath(config) if config.kind == "bridge" else VPPath(config)


def at(table: Tensor, n: Step, like: Tensor) -> Tensor:
    """Entries of a table, of dtype and device of ``like`` and shaped to multiply it."""
    return _pick(table, n).to(like).reshape(-1, *[1] * (like.ndim - 1))


def _pick(table: Tensor, n: Step) -> Tensor:
    return table[n.cpu() if isinstance(n, Tensor) else n]


def spaced_steps(steps: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Ascending step numbers: 0 .. steps - 1 in a section for each count, and evenly so many of each section.

    Strides add up in floating point and round half to even, as guided-diffusion and I2SB do. ConfigError
    where a section has fewer steps than its count.
    """
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise ConfigError(f"sampling.nfe: {count} of {size} steps cannot be kept; lower nfe")
        stride, place = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return tuple(kept)


class BridgePath:
    """I2SB (Liu et al., ICML 2023): from the source image to the target along a Brownian bridge.

    The network returns (x_n - x0) / sigma_n. Sums of the published code count beta_n on both sides and end at
    n = 0 with a remainder of x_n (``config.parity``); ours are exact and end at x0_hat.
    """

    from_noise = False
    learned = False

    def __init__(self, config: PathConfig) -> None:
        self.config, self.steps = config, config.steps
        ends = math.sqrt(config.beta_min), math.sqrt(config.beta_max / self.steps)
        half = torch.linspace(*ends, self.steps, dtype=torch.float64)[: self.steps // 2] ** 2
        betas = torch.cat([half, half.flip(0)])
        self.forward = betas.cumsum(0)
        self.backward = betas.flip(0).cumsum(0).flip(0) if config.parity else self.forward[-1] - self.forward
        self._times = torch.linspace(1e-4, 1.0, self.steps, dtype=torch.float32) * self.steps

    def sample(self, n: Step, x0: Tensor, x1: Tensor | None, z: Tensor | None) -> Tensor:
        x1 = self.start(x1, None)
        total = self.forward + self.backward
        x_n = at(self.backward / total, n, x0) * x0 + at(self.forward / total, n, x0) * x1
        if self.config.ode or z is None:
            return x_n
        return x_n + at((self.forward * self.backward / total).sqrt(), n, x0) * z

    def target(self, n: Step, x_n: Tensor, x0: Tensor, z: Tensor | None) -> Tensor:
        return (x_n - x0) / at(self.forward.sqrt(), n, x_n)

    def to_x0(self, n: Step, x_n: Tensor, out: Tensor) -> Tensor:
        return x_n - at(self.forward.sqrt(), n, x_n) * out

    def snr(self, n: Step) -> Tensor:
        # a^2 / s^2 without 0 / 0 at the source end
        ratio = self.backward / (self.forward * (self.forward + self.backward))
        return _pick(torch.full_like(ratio, math.inf) if self.config.ode else ratio, n)

    def time_input(self, n: Step) -> Tensor:
        return _pick(self._times, n)

    def grid(self, nfe: int, method: str = "ancestral") -> tuple[int, ...]:
        kept = spaced_steps(self.steps, [nfe + 1])[::-1]
        return kept if self.config.parity else (*kept[:-1], -1)

    def start(self, x1: Tensor | None, z: Tensor | None) -> Tensor:
        if x1 is None:
            raise ConfigError("path.kind: a bridge starts from a source image, and none is given; use vp")
        return x1

    def draws(self, m: int, method: str = "ancestral") -> bool:
        return not self.config.ode and m >= (1 if self.config.parity else 0)

    def stepper(self, grid: Sequence[int], method: str = "ancestral") -> Stepper:
        def step(k: int, x: Tensor, x0_hat: Tensor, z: Tensor | None, v: Tensor | None) -> Tensor:
            n, m = grid[k], grid[k + 1]
            if m < 0:
                return x0_hat
            share = float(self.forward[m] / self.forward[n])
            x_m = (1.0 - share) * x0_hat + share * x
            if z is None or not self.draws(m):
                return x_m
            return x_m + float((self.forward[m] * (1.0 - share)).sqrt()) * z

        return step


class Reverse:
    """p(x_m | x_n, x0) of neighbours in a chain of kept steps (Ho et al., 2020, eq. 7).

    ``abar``: float64, products of alphas at the kept steps, ascending; k: place in the chain, k - 1 is next.
    """

    def __init__(self, abar: Tensor, variance: str) -> None:
        before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
        beta = 1.0 - abar / before
        small = beta * (1.0 - before) / (1.0 - abar)
        small[0] = small[1] if len(small) > 1 else beta[0]  # 0 has no logarithm
        self.of_x0 = before.sqrt() * beta / (1.0 - abar)
        self.of_x = (abar / before).sqrt() * (1.0 - before) / (1.0 - abar)
        self.log_small, self.log_beta = small.log(), beta.log()
        self.log_fixed = self.log_small.clone()
        if variance == "fixed_large":
            self.log_fixed[1:] = self.log_beta[1:]

    def mean(self, k: Step, x: Tensor, x0: Tensor) -> Tensor:
        return at(self.of_x0, k, x) * x0 + at(self.of_x, k, x) * x

    def log_variance(self, k: Step, like: Tensor, v: Tensor | None) -> Tensor:
        """Fixed, or between its bounds as ``v`` in -1..1 says."""
        if v is None:
            return at(self.log_fixed, k, like)
        share = (v + 1.0) / 2.0
        return share * at(self.log_beta, k, like) + (1.0 - share) * at(self.log_small, k, like)


class VPPath:
    """Diffusion that keeps the variance (Ho et al., 2020): x_n = sqrt(abar) x0 + sqrt(1 - abar) z.

    ``schedule`` linear: 1e-4 to 0.02 at 1000 steps, scaled for others; cosine and ``learned_range``: Nichol
    and Dhariwal, ICML 2021.
    """

    from_noise = True

    def __init__(self, config: PathConfig) -> None:
        self.config, self.steps = config, config.steps
        self.learned = config.variance == "learned_range"
        if config.schedule == "linear":
            ends = 1e-4 * 1000 / self.steps, 0.02 * 1000 / self.steps
            betas = torch.linspace(*ends, self.steps, dtype=torch.float64)
        else:
            places = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            curve = torch.cos((places + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = 1.0 - curve[1:] / curve[:-1]
        self.betas = betas.clamp(max=0.999)
        self.abar = (1.0 - self.betas).cumprod(0)
        self.reverse = Reverse(self.abar, config.variance)
        a, s, one = self.abar.sqrt(), (1.0 - self.abar).sqrt(), torch.ones_like(self.abar)
        # The network returns p x0 + q z; with x_n = a x0 + s z this is solved for x0.
        p, q = {"epsilon": (0 * one, one), "sample": (one, 0 * one), "v_prediction": (-s, a)}[
            config.prediction
        ]
        self._a, self._s, self._p, self._q, self._det = a, s, p, q, a * q - s * p

    def sample(self, n: Step, x0: Tensor, x1: Tensor | None, z: Tensor | None) -> Tensor:
        return at(self._a, n, x0) * x0 + at(self._s, n, x0) * self.start(None, z)

    def target(self, n: Step, x_n: Tensor, x0: Tensor, z: Tensor | None) -> Tensor:
        return at(self._p, n, x_n) * x0 + at(self._q, n, x_n) * self.start(None, z)

    def to_x0(self, n: Step, x_n: Tensor, out: Tensor) -> Tensor:
        return at(self._q / self._det, n, x_n) * x_n - at(self._s / self._det, n, x_n) * out

    def snr(self, n: Step) -> Tensor:
        return _pick(self.abar / (1.0 - self.abar), n)

    def time_input(self, n: Step) -> Tensor:
        return torch.as_tensor(n, dtype=torch.float32)

    def grid(self, nfe: int, method: str = "ancestral") -> tuple[int, ...]:
        """Of ancestral runs: even strides over all steps; ddim: the smallest whole stride from 0 (both as in
        guided-diffusion); dpmsolver: even strides without step 0, as in diffusers."""
        if nfe == 1:
            return self.steps - 1, -1
        if method == "dpmsolver":
            return (*spaced_steps(self.steps, [nfe + 1])[:0:-1], -1)
        if method == "ancestral":
            return (*spaced_steps(self.steps, [nfe])[::-1], -1)
        stride = -(-self.steps // nfe)
        kept = range(0, self.steps, stride)
        if len(kept) != nfe:
            raise ConfigError(
                f"sampling.nfe: no whole stride takes {nfe} of {self.steps} steps for ddim; take {len(kept)}"
            )
        return (*kept[::-1], -1)

    def start(self, x1: Tensor | None, z: Tensor | None) -> Tensor:
        if z is None:
            raise ConfigError("path.kind: vp starts from noise, and none is given; use bridge")
        return z

    def draws(self, m: int, method: str = "ancestral") -> bool:
        return method == "ancestral" and m >= 0

    def stepper(self, grid: Sequence[int], method: str = "ancestral") -> Stepper:
        if method == "dpmsolver":
            return self._solver(grid)
        kept = [n for n in reversed(grid) if n >= 0]
        chain = Reverse(self.abar[kept], self.config.variance)

        def step(k: int, x: Tensor, x0_hat: Tensor, z: Tensor | None, v: Tensor | None) -> Tensor:
            n, m = grid[k], grid[k + 1]
            if m < 0:
                return x0_hat
            if method == "ddim":
                noise = (x - at(self._a, n, x) * x0_hat) / at(self._s, n, x)
                return self.sample(m, x0_hat, None, noise)
            place = len(kept) - 1 - k
            mean = chain.mean(place, x, x0_hat)
            return mean if z is None else mean + (0.5 * chain.log_variance(place, x, v)).exp() * z

        return step

    def _solver(self, grid: Sequence[int]) -> Stepper:
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=self.steps, trained_betas=self.betas.tolist(), prediction_type="sample"
        )
        scheduler.alphas_cumprod = self.abar.numpy()  # its own are float32, and numpy 2 warns of torch's
        scheduler.set_timesteps(timesteps=list(grid[:-1]))

        def step(k: int, x: Tensor, x0_hat: Tensor, z: Tensor | None, v: Tensor | None) -> Tensor:
            return scheduler.step(x0_hat, scheduler.timesteps[k], x).prev_sample

        return step
