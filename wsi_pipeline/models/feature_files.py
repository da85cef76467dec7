"""Weights of feature extractors: the user's files, found, digested and filled into a network.

Nothing is downloaded: a figure that rests on a network names the file and its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.checkpoint_file import few, read_checkpoint
from wsi_pipeline.models.features import F32, clean_resize
from wsi_pipeline.models.tensor_file import StoredTensors, read_header

__all__ = ["fill_network", "needed_file", "read_tensors", "resized_tensor", "sha256_of"]

_NESTED = ("state_dict", "model", "teacher")


def needed_file(path: Path | None, kind: str, remedy: str) -> Path:
    """The weights file; CheckpointError with the remedy where none is named or none is there."""
    if path is None:
        raise CheckpointError(f"extractor {kind}: needs a weights file, and none is downloaded; {remedy}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, extractor {kind} needs it; {remedy}")
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes; CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and the rights"
        ) from error


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of what ``torch.save`` wrote; no code of the file is run."""
    if path.suffix == ".safetensors":
        return dict(StoredTensors({name: (path, name) for name in read_header(path, remedy).shapes}))
    state: Mapping[str, Any] = read_checkpoint(path)
    for key in _NESTED:
        if isinstance(state.get(key), Mapping):
            state = state[key]
    state = {name.removeprefix("module.").removeprefix("backbone."): value for name, value in state.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def fill_network(
    network: Any, state: Mapping[str, Tensor], *, source: Path, what: str, extra: tuple[str, ...] = ()
) -> None:
    """Load a state that must hold every tensor of the network, each of its shape.

    ``extra``: beginnings of names that the file may have besides (classifiers). Raises CheckpointError.
    """
    wanted = network.state_dict()
    given = {name: value for name, value in state.items() if name in wanted or not name.startswith(extra)}
    kinds = {
        "missing": [name for name in wanted if name not in given],
        "extra": [name for name in given if name not in wanted],
        "of another shape": [n for n, v in wanted.items() if n in given and given[n].shape != v.shape],
    }
    said = [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]
    if said:
        raise CheckpointError(
            f"{source}: does not fit {what}: of {len(wanted)} tensors {', '.join(said)}; "
            "name the model that the file was made for"
        )
    network.load_state_dict(given)


def resized_tensor(pixels_BHWC: npt.NDArray[np.uint8], side: int) -> Tensor:
    """Tiles through ``clean_resize``: [B, 3, side, side] float32 in [0, 255]."""
    resized_BHWC: F32 = np.stack([clean_resize(tile, side) for tile in pixels_BHWC])
    return torch.from_numpy(resized_BHWC).permute(0, 3, 1, 2).contiguous()
