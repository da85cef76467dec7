"""Averaged weights (Polyak and Juditsky, 1992): lent to the network while it is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = ["swapped"]


@contextlib.contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters have the values of the averages; nothing happens where there are none."""
    kept = {name: parameters[name].detach().clone() for name in averages}
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
