"""The base model: a folder in diffusers' layout, or the same in the Hugging Face cache.

Files needed, in sub-folders: ``FILES``. Nothing here touches the network but ``fetch_base``. Why the schedule
is checked: the one-step formula holds for SD-Turbo's alone, and with another base the output is wrong without
any error. torch, safetensors and huggingface_hub are imported on use.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.tensor_file import Shape, StoredTensors, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_pipeline.models.base_model import Base

__all__ = ["FILES", "SD_TURBO", "fetch_base", "find_base", "load_base"]

SD_TURBO = "stabilityai/sd-turbo"

FILES = (
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
)
"""What is downloaded: 5.2 GB of SD-Turbo, without its half-precision copies."""

SHARDS = ("*/*.safetensors.index.json", "*/*-of-*.safetensors")
LICENCE_FILES = ("LICENSE*", "README.md")

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
"""What the one-step formula relies on (``lora_turbo.one_step``)."""

UNSTATED = {"prediction_type": "epsilon", "clip_sample": False, "rescale_betas_zero_snr": False}
"""What diffusers' EulerDiscreteScheduler assumes where the file is silent."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in autoencoders saved before diffusers 0.15 -> names since then."""


def find_base(path_or_hub_id: str | Path) -> Path:
    """The base model's folder: the one that is named, or the snapshot of that hub id in the cache.

    Raises CheckpointError where there is neither, with what to do.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: is a file; give the folder that holds unet/, vae/, text_encoder/ ..."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    hub_id = str(path_or_hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES), local_files_only=True))
    except LocalEntryNotFoundError as error:
        # Newer versions refuse an incomplete snapshot: what is needed of it may still be there.
        if (part := getattr(error, "snapshot_path", None)) is not None:
            return Path(part)
        raise CheckpointError(
            f"{hub_id}: is no folder here and not in the Hugging Face cache; "
            f"get it with `wsi-pipeline models fetch {hub_id}`, or name a folder "
            "with it (--base; of a training model.base)"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"{hub_id}: no such folder; give one, or a hub id such as {SD_TURBO}"
        ) from error


def load_base(path_or_hub_id: str | Path) -> Base:
    """The base model's UNet and autoencoder, mapped from their files; never downloads.

    Raises CheckpointError where a file is missing or damaged, tensors do not fit the configuration, or the
    noise schedule is not SD-Turbo's. All tensors are read once, for the digest (3.8 GB: seconds to a minute).
    """
    from wsi_pipeline.models.base_model import Base
    from wsi_pipeline.models.weights import tensors_digest

    folder = find_base(path_or_hub_id)
    _check_schedule(folder / "scheduler" / "scheduler_config.json")
    unet_config = _network_config(folder / "unet" / "config.json", "UNet2DConditionModel")
    vae_config = {"scaling_factor": 0.18215} | _network_config(
        folder / "vae" / "config.json", "AutoencoderKL"
    )
    unet_shapes, vae_shapes = _expected(folder, unet_config, vae_config)
    unet = _network(folder / "unet", unet_shapes)
    vae = _network(folder / "vae", vae_shapes)
    both = {f"unet.{key}": unet[key] for key in unet} | {f"vae.{key}": vae[key] for key in vae}
    is_folder = Path(path_or_hub_id).expanduser().is_dir()
    return Base(
        name=folder.resolve().name if is_folder else str(path_or_hub_id),
        digest=tensors_digest(both),
        unet_config=unet_config,
        vae_config=vae_config,
        unet=unet,
        vae=vae,
    )


def fetch_base(hub_id: str = SD_TURBO) -> Path:
    """Download the files that are needed into the Hugging Face cache; the folder of the snapshot.

    What is there already is not downloaded again. Raises CheckpointError with what to put where by hand.
    """
    from huggingface_hub import errors, snapshot_download

    # The parents of its own error are its HTTP library's, which differs from version to version.
    failures = (*errors.HfHubHTTPError.__bases__, OSError, getattr(errors, "XetDownloadError", OSError))
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*FILES, *SHARDS, *LICENCE_FILES]))
    except errors.HFValidationError as error:
        raise CheckpointError(f"{hub_id}: is no hub id; give one such as {SD_TURBO}") from error
    except failures as error:
        raise CheckpointError(f"{hub_id}: {_remedy(hub_id, error)}") from error
    missing = [name for name in FILES if not name.endswith(".safetensors") and not (folder / name).is_file()]
    for part in ("unet", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            missing.append(f"{part}/*.safetensors")
    if missing:
        raise CheckpointError(f"{hub_id}: is no base model, it lacks {', '.join(missing)}; try {SD_TURBO}")
    return folder


def _remedy(hub_id: str, error: Exception) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import errors

    by_hand = (
        f"download elsewhere from https://huggingface.co/{hub_id}/tree/main {', '.join(FILES)}, "
        f"put them with their sub-folders into a folder {Path(hub_id).name} here, "
        f"and import with `wsi-pipeline models import CKPT --base {Path(hub_id).name} -o OUT.safetensors`"
    )
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms on its page and log in with `hf auth login`, or {by_hand}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is not on the Hugging Face hub, or is private; give another id, e.g. {SD_TURBO}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"is not in the cache, and HF_HUB_OFFLINE is set; unset it, or {by_hand}"
        return f"huggingface.co cannot be reached; connect, or {by_hand}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space for it in the Hugging Face cache (5.2 GB); free some, or move the cache with HF_HOME"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"cannot be downloaded ({first}); try again, or {by_hand}"


def _check_schedule(path: Path) -> None:
    config = _json(path)
    found = {key: config.get(key, UNSTATED.get(key)) for key in SCHEDULE}
    if wrong := [
        f"{key} {found[key]!r} (not {SCHEDULE[key]!r})" for key in SCHEDULE if found[key] != SCHEDULE[key]
    ]:
        raise CheckpointError(
            f"{path}: another noise schedule than SD-Turbo's, {', '.join(wrong)}; "
            "the one-step formula does not hold for it: give SD-Turbo as --base"
        )


def _network_config(path: Path, kind: str) -> dict[str, Any]:
    """A network's configuration, without the keys that diffusers keeps for itself."""
    config = _json(path)
    if (found := config.get("_class_name", kind)) != kind:
        raise CheckpointError(f"{path}: describes a {found}, not a {kind}; give SD-Turbo as --base")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); a base model needs it") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no settings, but a {type(document).__name__}; copy it again")
    return document


def _expected(
    folder: Path, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """diffusers key -> shape of both networks, from their configurations."""
    from wsi_pipeline.models.layout import Layout

    layout = Layout(unet_config=unet_config, vae_config=vae_config, rank_unet=0, rank_vae=0, vaes=())
    try:
        unet, vae = layout.unet_base, layout.vae_base
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: its networks cannot be built from their config.json ({error}); "
            "give SD-Turbo as --base"
        ) from error
    return unet, {key: shape for key, shape in vae.items() if ".skip_conv_" not in key}


def _network(folder: Path, expected: Mapping[str, Shape]) -> Mapping[str, Tensor]:
    """The tensors of one network by diffusers' keys, in the order of its modules, shapes checked."""
    tensors = {_modern(key, expected): tensor for key, tensor in _stored(folder).items()}
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    wrong = [k for k in expected if k in tensors and tuple(tensors[k].shape) != expected[k]]
    named = {"lacks": missing, "has besides": extra, "has another shape for": wrong}
    if found := [f"{verb} {len(keys)} tensors (first {keys[0]})" for verb, keys in named.items() if keys]:
        raise CheckpointError(
            f"{folder}: its weights do not fit its config.json: {', '.join(found)}; copy it again"
        )
    return {key: tensors[key] for key in expected}


def _unpickled(path: Path) -> Mapping[str, Tensor]:
    import torch

    from wsi_pipeline.models.checkpoint_file import read_checkpoint

    tensors = read_checkpoint(path)
    if other := [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"{path}: {other[0]} is no tensor; copy the file again")
    return tensors


def _modern(key: str, expected: Mapping[str, Shape]) -> str:
    module, _, last = key.rpartition(".")
    parent, _, name = module.rpartition(".")
    renamed = f"{parent}.{OLD_ATTENTION[name]}.{last}" if name in OLD_ATTENTION else key
    return renamed if renamed in expected else key


def _stored(folder: Path) -> Mapping[str, Tensor]:
    """Key -> tensor of the first kind of weights file that the folder has; mapped, not read."""
    stem = "diffusion_pytorch_model"
    remedy = "copy it again"
    for variant in ("", ".fp16"):
        whole, index = (
            folder / f"{stem}{variant}.safetensors",
            folder / f"{stem}.safetensors.index{variant}.json",
        )
        if whole.is_file():
            return StoredTensors({key: (whole, key) for key in read_header(whole, remedy).shapes})
        if index.is_file():
            return _shards(index)
    for pickled in (folder / f"{stem}.bin", folder / f"{stem}.fp16.bin"):
        if pickled.is_file():
            return _unpickled(pickled)
    raise CheckpointError(
        f"{folder}: has no {stem}.safetensors; `wsi-pipeline models fetch` gets it, or copy it there"
    )


def _shards(index: Path) -> Mapping[str, Tensor]:
    places = {}
    try:
        for key, name in dict(_json(index)["weight_map"]).items():
            # A name with folders in it could point anywhere on the machine.
            places[str(key)] = (index.with_name(Path(str(name)).name), str(key))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index}: is no index of weights ({error!r}); copy it again") from error
    for shard in {path for path, _ in places.values()}:
        read_header(shard, "copy it again")
    return StoredTensors(places)
