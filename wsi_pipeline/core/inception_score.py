"""Inception score, in the two published ways: exp of the mean KL of each image's classes from all images'.

On tissue it lies between 1 and 2 and says next to nothing: the 1008 classes are dogs and cars. It is here
because papers print it (S. Barratt and R. Sharma, "A note on the Inception Score", 2018, say why not to).

Sources: T. Salimans et al., NIPS 2016; P. Dhariwal and A. Nichol, 2021 (ADM's evaluator: runs of 5000).
Parity is with the latter and with torch-fidelity (ten shuffled parts); both take logits without the bias of
the last layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from wsi_pipeline.errors import ConfigError

__all__ = ["inception_score", "inception_score_in_runs"]

Logits = npt.NDArray[np.floating[Any]]


def inception_score(logits_NK: Logits, *, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """Mean and standard deviation over ``splits`` parts with borders ``i * N // splits``, as torch-fidelity.

    ``seed``: of the shuffling before, by numpy's legacy generator; None: as they come. Raises ConfigError for
    fewer images than parts.
    """
    count = len(logits_NK)
    if not 0 < splits <= count:
        raise ConfigError(f"inception score: {count} images in {splits} parts; give more tiles")
    if seed is not None:
        logits_NK = logits_NK[np.random.RandomState(seed).permutation(count)]
    borders = [i * count // splits for i in range(splits + 1)]
    scores = [_score(logits_NK[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_in_runs(logits_NK: Logits, *, size: int = 5000) -> float:
    """Mean over consecutive runs of ``size`` images, as ADM; a short last run counts like the others."""
    return float(np.mean([_score(logits_NK[i : i + size]) for i in range(0, len(logits_NK), size)]))


def _score(logits_NK: Logits) -> float:
    log_NK = log_softmax(logits_NK.astype(np.float64), axis=1)
    p_NK = np.exp(log_NK)
    with np.errstate(divide="ignore"):
        all_K = np.maximum(np.log(p_NK.mean(axis=0)), np.finfo(np.float64).min)
    return float(np.exp((p_NK * (log_NK - all_K)).sum(axis=1).mean()))
