"""Checkpoints: one safetensors file with all that is needed to go on as if nothing had happened.

Tensors: ``<group>/<parameter>`` as it stands, ``<group>/<parameter>/exp_avg`` and ``/exp_avg_sq`` of Adam,
``buffer/<name>``, ``ema/<parameter>``. Metadata: the step, the fingerprint of the run, numbers of the
optimisers, and notes of the run (its best validation): what is in the same file cannot contradict the
weights, wherever a run is killed. There is no state of a random generator, because nothing draws from one:
all draws are functions of (seed, sample number).

A file appears under its name when it is whole (written aside, flushed, renamed), so whatever has the name can
be read; one that was damaged later is told by its size and passed over for the one before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from wsi_pipeline.errors import CheckpointError, ConfigError, FingerprintMismatchError, OutputError
from wsi_pipeline.models.tensor_file import Stored, read_header, write_file
from wsi_pipeline.training.objective import Group

__all__ = [
    "Checkpoint",
    "State",
    "checkpoint_bytes",
    "damaged_checkpoints",
    "find_checkpoints",
    "learned_of",
    "load_checkpoint",
    "prune",
    "save_checkpoint",
]

KEY = "wsi_pipeline_training"
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What training changes, by reference: saving reads it, loading writes into it."""

    groups: Mapping[Group, Mapping[str, nn.Parameter]]
    buffers: Mapping[str, Tensor]
    optimisers: Mapping[Group, torch.optim.Optimizer]
    ema: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint file; ``step``: iterations that are behind it."""

    path: Path
    step: int


def save_checkpoint(
    folder: Path,
    step: int,
    state: State,
    fingerprint: str,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> Checkpoint:
    """Write ``step-XXXXXXXX.safetensors``, all of it or nothing; ``notes``: of the run, fit for JSON.

    Raises OutputError where the disk is full or cannot be written.
    """
    tensors = _tensors(state)
    steps = {
        f"{group}/{name}": float(state.optimisers[group].state[p]["step"])
        for group, parameters in state.groups.items()
        for name, p in parameters.items()
        if "step" in state.optimisers[group].state[p]
    }
    document = {
        "format": 1,
        "step": step,
        "fingerprint": fingerprint,
        "adam_steps": steps,
        "notes": dict(notes),
    }
    path = folder / f"step-{step:08d}.safetensors"
    entries = {
        name: Stored("F32", tuple(tensor.shape), tensor.numel() * 4, 4) for name, tensor in tensors.items()
    }
    metadata = {"format": "pt", KEY: json.dumps(document)}
    try:
        write_file(path, entries, lambda name: tensors[name].float(), metadata)
    except (ConfigError, CheckpointError) as error:  # which speak of weights; here a run is under way
        raise OutputError(str(error), path=path) from error
    return Checkpoint(path=path, step=step)


def load_checkpoint(checkpoint: Checkpoint, state: State, fingerprint: str) -> dict[str, Any]:
    """Put a checkpoint into networks and optimisers, bit for bit; returns the notes that it was saved with.

    Raises CheckpointError for a damaged file, FingerprintMismatchError where another configuration made it.
    """
    from safetensors.torch import load_file

    document = _document(checkpoint.path)
    if document["fingerprint"] != fingerprint:
        raise FingerprintMismatchError(
            f"{checkpoint.path}: was made with other settings; train into another folder, or throw the run "
            "away with --restart",
            path=checkpoint.path,
        )
    stored = load_file(checkpoint.path)
    wanted = _slots(state)
    if lacking := sorted(wanted - stored.keys()):
        raise CheckpointError(
            f"{checkpoint.path}: lacks {lacking[0]} and {len(lacking) - 1} more; use --restart"
        )
    with torch.no_grad():
        for group, parameters in state.groups.items():
            optimiser = state.optimisers[group]
            for name, parameter in parameters.items():
                key = f"{group}/{name}"
                parameter.copy_(stored[key])
                if key in document["adam_steps"]:
                    moments = {m: stored[f"{key}/{m}"].to(parameter.device) for m in _MOMENTS}
                    count = torch.tensor(
                        document["adam_steps"][key], dtype=torch.float32, device=parameter.device
                    )
                    optimiser.state[parameter] = {"step": count, **moments}
        for name, buffer in state.buffers.items():
            buffer.copy_(stored[f"buffer/{name}"])
        for name, average in state.ema.items():
            average.copy_(stored[f"ema/{name}"])
    return dict(document.get("notes", {}))


def learned_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The generator's parameters of a checkpoint by their canonical names, averaged where it has averages."""
    from safetensors.torch import load_file

    stored = load_file(checkpoint.path)
    for prefix in ("ema/", "generator/"):
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in stored.items()
            if name.startswith(prefix) and not name.endswith(tuple(f"/{m}" for m in _MOMENTS))
        }
        if found:
            moving = "buffer/generator/"  # statistics of norms belong to the weights
            rest = {n.removeprefix(moving): t for n, t in stored.items() if n.startswith(moving)}
            return found | rest
    raise CheckpointError(f"{checkpoint.path}: holds no generator")


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Whole checkpoints of a run, oldest first; files of other kinds and damaged ones are passed over."""
    return [checkpoint for checkpoint in _named(folder) if _is_whole(checkpoint.path)]


def damaged_checkpoints(folder: Path) -> list[Path]:
    """Files that should be checkpoints and are not whole."""
    return [checkpoint.path for checkpoint in _named(folder) if not _is_whole(checkpoint.path)]


def _named(folder: Path) -> list[Checkpoint]:
    matches = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.glob("step-*.safetensors"))]
    return [Checkpoint(path=path, step=int(match[1])) for path, match in matches if match]


def _is_whole(path: Path) -> bool:
    try:
        _document(path)
    except CheckpointError:
        return False
    return True


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best."""
    for checkpoint in find_checkpoints(folder)[:-keep]:
        if checkpoint.step != best:
            checkpoint.path.unlink(missing_ok=True)


def checkpoint_bytes(state: State) -> int:
    """Size of a checkpoint once the optimisers have their moments."""
    learned = sum(p.numel() for parameters in state.groups.values() for p in parameters.values())
    rest = [*state.buffers.values(), *state.ema.values()]
    return 4 * int(3 * learned + sum(tensor.numel() for tensor in rest))


def _tensors(state: State) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for group, parameters in state.groups.items():
        for name, parameter in parameters.items():
            key = f"{group}/{name}"
            tensors[key] = parameter.detach()
            moments = state.optimisers[group].state[parameter]
            tensors |= {f"{key}/{m}": moments[m] for m in _MOMENTS if m in moments}
    tensors |= {f"buffer/{name}": buffer for name, buffer in state.buffers.items()}
    return tensors | {f"ema/{name}": average for name, average in state.ema.items()}


def _slots(state: State) -> set[str]:
    names = {f"{group}/{name}" for group, parameters in state.groups.items() for name in parameters}
    return names | {f"buffer/{name}" for name in state.buffers} | {f"ema/{name}" for name in state.ema}


def _document(path: Path) -> dict[str, Any]:
    header = read_header(path, "train again with --restart")
    try:
        return dict(json.loads(header.metadata[KEY]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of a training run; use --restart") from error
