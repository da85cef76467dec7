"""Figures of pairs of tiles: what a translation kept of its source, and how close it came to the truth.

A tile that is glass has no structure figures (NaN) and counts in no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from wsi_pipeline.core.paired import mae, mutual_information
from wsi_pipeline.core.protocols import U8_BHWC, U8_HWC, WHITE
from wsi_pipeline.core.structure import compare_structure, psnr, ssim
from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.evaluation.settings import Emit, EvaluateConfig, Progress, Stage
from wsi_pipeline.evaluation.tile_sets import TileSet

__all__ = [
    "BatchMeasure",
    "Pairs",
    "TileMeasure",
    "load_dino",
    "load_lpips",
    "measure_pairs",
    "to_source",
    "to_truth",
]

F64: TypeAlias = npt.NDArray[np.float64]
Pairs: TypeAlias = Sequence[tuple[int, int]]
"""Rows of the generated and of the other side."""

TileMeasure: TypeAlias = Callable[[U8_HWC, U8_HWC], Mapping[str, float]]
"""Other tile (source or truth) and generated tile -> figures by key; called by threads."""
BatchMeasure: TypeAlias = Callable[[U8_BHWC, U8_BHWC], F64]
"""The same for a batch and one figure, [B]; called by one thread, it may be on a GPU."""


def measure_pairs(
    generated: TileSet,
    other: TileSet,
    pairs: Pairs,
    each: TileMeasure,
    batched: Mapping[str, BatchMeasure],
    config: EvaluateConfig,
    emit: Emit,
) -> dict[str, F64]:
    """Figures of every pair by key, [N] in the order of ``pairs``; each tile is read once."""
    emit(Stage(stage=f"{other.role} against generated tiles"))
    found: dict[str, list[float]] = {}

    def look(pair: tuple[int, int]) -> tuple[U8_HWC, U8_HWC, Mapping[str, float]]:
        output, given = generated.read(pair[0]), other.read(pair[1])
        return given, output, each(given, output)

    with ThreadPoolExecutor(config.workers, "pairs") as pool:

        def queued(start: int) -> list[Future[tuple[U8_HWC, U8_HWC, Mapping[str, float]]]]:
            return [pool.submit(look, pair) for pair in pairs[start : start + config.batch]]

        coming = queued(0)
        for start in range(0, len(pairs), config.batch):
            batch, coming = coming, queued(start + config.batch)
            seen = [future.result() for future in batch]
            for _, _, values in seen:
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
            if batched:
                given_BHWC = np.stack([given for given, _, _ in seen])
                output_BHWC = np.stack([output for _, output, _ in seen])
            for key, measure in batched.items():
                found.setdefault(key, []).extend(measure(given_BHWC, output_BHWC).tolist())
            emit(Progress(done=start + len(seen), total=len(pairs)))
    return {key: np.array(values, np.float64) for key, values in found.items()}


def to_source(source_HWC: U8_HWC, output_HWC: U8_HWC) -> dict[str, float]:
    """What became of the source's structure."""
    found = compare_structure(source_HWC, output_HWC)
    return {
        "structure_ssim": found.ssim,
        "shift_median": found.shift_median,
        "shift_p95": found.shift_p95,
        "matched": found.matched,
        "edges_lost": found.edges_lost,
        "edges_added": found.edges_added,
    }


def to_truth(truth_HWC: U8_HWC, output_HWC: U8_HWC) -> dict[str, float]:
    """How close the output came to the true picture, where that is not black: a registered section ends
    inside its tiles."""
    valid_HW = truth_HWC.max(axis=2) > 0
    true_HWC, made_HWC = (np.where(valid_HW[..., None], x, WHITE) for x in (truth_HWC, output_HWC))
    return {
        "psnr": psnr(truth_HWC, output_HWC, valid_HW=valid_HW),
        "ssim": ssim(truth_HWC, output_HWC, valid_HW=valid_HW),
        "mae": mae(truth_HWC, output_HWC, valid_HW),
        "nmi": mutual_information(truth_HWC, output_HWC, valid_HW),
        "true_structure_ssim": compare_structure(true_HWC, made_HWC).ssim,
    }


def load_lpips(vgg: str | None, device: str) -> BatchMeasure | None:
    """LPIPS on the device; None where no VGG16 was named and torch's cache has none. CheckpointError where
    the one that was named does not do."""
    import torch

    from wsi_pipeline.models.lpips import make_lpips
    from wsi_pipeline.models.pixels import from_uint8

    try:
        distance = make_lpips(None if vgg is None else Path(vgg).expanduser()).to(device)
    except CheckpointError:
        if vgg is not None:
            raise
        return None

    def measure(given_BHWC: U8_BHWC, output_BHWC: U8_BHWC) -> F64:
        with torch.inference_mode():
            x, y = (from_uint8(torch.from_numpy(t).to(device)) for t in (given_BHWC, output_BHWC))
            return np.asarray(distance(x, y).double().cpu().numpy(), np.float64)

    return measure


def load_dino(weights: str, device: str) -> BatchMeasure:
    """DINO-structure on the device; CheckpointError where the weights do not do."""
    from wsi_pipeline.models.dino import make_dino_structure

    return make_dino_structure(Path(weights).expanduser(), device=device)
