"""The loss of every path: squared error of what the network returns, weighted by step or by band.

P2 (Choi et al., CVPR 2022) weighs the epsilon loss by 1 / (k + SNR)^gamma; the same loss in terms of x0 has
SNR times that weight, in terms of v SNR / (SNR + 1) times. Learned variances (Nichol and Dhariwal, ICML 2021)
follow the variational bound, which sends no gradient into the mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators.parts import Net, Parts
from wsi_pipeline.translators.paths import Path, VPPath
from wsi_pipeline.translators.representations import Representation
from wsi_pipeline.translators.settings import WeightConfig

__all__ = ["band_weights", "path_loss", "step_weights"]


def path_loss(
    net: Net,
    parts: Parts,
    weight: WeightConfig,
    *,
    x0: Tensor,
    source: Tensor | None,
    label: Tensor | None,
    n: Tensor,
    z: Tensor,
    drop_B: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of a batch, and its terms without gradient: ``mse`` and, with learned variances, ``vlb``.

    ``x0``, ``z``: pixels and their standard normals, [B,C,...]; ``source``: [B, sources * C, ...]; ``n``:
    int64 [B], best on the CPU; ``drop_B``: bool, samples that lose their condition.
    """
    path, rep = parts.path, parts.representation
    h0, hz = rep.encode(x0), rep.encode_noise(z)
    x1, source_h = parts.encode_source(source)
    x_n = path.sample(n, h0, x1, hz)
    if drop_B is not None:
        source_h, label = parts.condition.drop(source_h, label, drop_B)
    out, v = parts.ask(net, n, x_n, source_h, label)
    squares = (out - path.target(n, x_n, h0, hz)) ** 2
    if weight.kind == "bands":
        weights = band_weights(rep, weight, squares.shape[1]).to(squares)
        squares = squares * weights.reshape(-1, *[1] * (squares.ndim - 2))
    terms = {"mse": (squares.flatten(1).mean(1) * step_weights(path, weight, n).to(squares)).mean()}
    if v is not None and isinstance(path, VPPath):
        bits_B = _bits(path, n, x_n, h0, out.detach(), v)
        terms["vlb"] = weight.vlb * path.steps / 1000 * bits_B.mean()
    return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}


def step_weights(path: Path, weight: WeightConfig, n: Tensor) -> Tensor:
    """Weight of the samples' squared errors by their steps, float64 [B]."""
    snr = path.snr(n)
    if weight.kind != "p2":
        return torch.ones_like(snr)
    if path.config.kind != "vp":
        raise ConfigError("weight.kind: p2 weighs the steps of vp paths; take uniform or bands for a bridge")
    factor = {"epsilon": 1.0, "sample": snr, "v_prediction": snr / (snr + 1.0)}[path.config.prediction]
    return factor * (weight.k + snr) ** -weight.gamma


def band_weights(rep: Representation, weight: WeightConfig, channels: int) -> Tensor:
    """Weight of each channel, float64; ``parseval``: the squared error of pixels, whatever the divisors."""
    if weight.bands == "parseval":
        return rep.divisors(channels) ** 2
    values = (1.0,) * rep.bands if weight.bands == "equal" else weight.bands
    if len(values) != rep.bands:
        raise ConfigError(f"weight.bands: {len(values)} weights for {rep.bands} bands of the representation")
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(channels // rep.bands)


def _bits(path: VPPath, n: Tensor, x_n: Tensor, x0: Tensor, out: Tensor, v: Tensor) -> Tensor:
    """Variational bound of each sample in bits a value, [B]: the Kullback-Leibler divergence of the reverse
    step, or at step 0 the likelihood of x0 as one of 256 levels in -1..1."""
    reverse = path.reverse
    mean = reverse.mean(n, x_n, path.to_x0(n, x_n, out))
    log_variance = reverse.log_variance(n, x_n, v)
    true_mean, true_log = reverse.mean(n, x_n, x0), reverse.log_variance(n, x_n, -torch.ones_like(v))
    gap = (true_mean - mean) ** 2 * torch.exp(-log_variance)
    nats = 0.5 * (log_variance - true_log - 1.0 + torch.exp(true_log - log_variance) + gap)
    scale = torch.exp(-0.5 * log_variance)
    above, below = (_normal_cdf(scale * (x0 - mean + side / 255.0)) for side in (1.0, -1.0))
    mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1.0 - below, above - below))
    nats = torch.where(
        (n == 0).to(x0.device).reshape(-1, *[1] * (x0.ndim - 1)), -mass.clamp(min=1e-12).log(), nats
    )
    return nats.flatten(1).mean(1) / math.log(2.0)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
