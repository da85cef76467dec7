"""The published checkpoint of Diffusion-FFPE (``model.pkl``), in and out, and the way in for foreign files.

The format: two ranks, the UNet's conv_in, the UNet's adapters in three dictionaries, and all four VAEs twice,
in two orders. The published program loads it strictly, so what is written here has its very keys, order and
shapes. It extends CycleGAN-turbo's format (``turbo_formats``). Source: Zhang et al., Diffusion-FFPE (BIBM
2024).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.base_model import Base
from wsi_pipeline.models.checkpoint_file import few, read_checkpoint
from wsi_pipeline.models.layout import DIRECTIONS, VAES, Layout, Shape
from wsi_pipeline.models.turbo_formats import (
    CYCLEGAN_LISTS,
    VAE_ALPHA,
    VAE_SECTIONS,
    import_cyclegan,
    import_pix2pix,
    import_sections,
    layout_of,
    lora_sections,
)
from wsi_pipeline.models.weights import Imported, TurboWeights

__all__ = ["export_published", "import_checkpoint", "import_published", "published_layout"]

_CONV_IN = "unet_conv_in"
_UNET_ADAPTERS = ("sd_encoder", "sd_decoder", "sd_other")
_ORDERED = (_CONV_IN, *VAE_SECTIONS)  # state dicts of modules; the others are plain dictionaries
_FORMATS = "diffusion-ffpe, cyclegan-turbo and pix2pix-turbo"


def import_checkpoint(path: str | Path, base: Base) -> Imported:
    """The weights of a foreign file in any of the three formats; CheckpointError names what is wrong."""
    source = str(path)
    checkpoint = read_checkpoint(path)
    if "state_dict_unet" in checkpoint:
        return import_pix2pix(checkpoint, base, source)
    if not any(entry in checkpoint for entry in (_CONV_IN, *_UNET_ADAPTERS, *VAE_SECTIONS)):
        remedy = "name the file that holds the generator"
        if "optimizer_gen" in checkpoint:  # Diffusion-FFPE's resume_latest.pkl
            remedy = "this is a training state: name the model_<step>.pkl beside it"
        raise CheckpointError(
            f"{source}: has none of the formats that are understood ({_FORMATS}), its keys are "
            f"{few(list(checkpoint)) or 'none'}; {remedy}"
        )
    if _CONV_IN not in checkpoint and any(entry in checkpoint for entry in CYCLEGAN_LISTS):
        return import_cyclegan(checkpoint, base, source)
    return import_published(checkpoint, base, source)


def import_published(checkpoint: Mapping[str, Any], base: Base, source_name: str) -> Imported:
    """Both directions of a Diffusion-FFPE checkpoint on top of its base; ``source_name`` begins every error.

    Local encoders are there if the file has tensors of ``vae_patch``. conv_in of the UNet and all of the VAEs
    are the file's. Raises one CheckpointError for all keys that are missing, too many or of another shape.
    """
    stored = [entries for entry in VAE_SECTIONS if isinstance(entries := checkpoint.get(entry), Mapping)]
    local = VAES["a2b"][1]
    multi_view = any(str(key).startswith(f"{local}.") for entries in stored for key in entries)
    vaes = tuple(VAES[d][view] for view in range(2 if multi_view else 1) for d in DIRECTIONS)
    layout = layout_of(checkpoint, base, vaes, source_name)
    return import_sections(
        checkpoint, base, source_name, layout, _sections(layout), known=(), kind="diffusion-ffpe"
    )


def published_layout(layout: Layout) -> dict[str, dict[str, Shape] | int]:
    """Keys and shapes of the published file, in its order."""
    shapes = layout.canonical()
    sections = _sections(layout).items()
    return _in_order(
        layout, {entry: {key: shapes[name] for key, name in keys.items()} for entry, keys in sections}
    )


def _sections(layout: Layout) -> dict[str, dict[str, str]]:
    """Dictionary of the file -> its keys -> canonical names, in the order in which the programs load them."""
    keys = {f"base_layer.{leaf}": f"unet.conv_in.{leaf}" for leaf in ("weight", "bias")}
    keys |= {f"lora_{m}.default_encoder.weight": f"unet.conv_in.lora_{m}.weight" for m in "AB"}
    return {_CONV_IN: keys, **lora_sections(layout)}


def _in_order(layout: Layout, sections: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank_unet": layout.rank_unet,
        **{entry: sections[entry] for entry in (_CONV_IN, *_UNET_ADAPTERS)},
        "rank_vae": layout.rank_vae,
        **{entry: sections[entry] for entry in VAE_SECTIONS},
    }


def export_published(weights: TurboWeights, path: str | Path) -> None:
    """Write ``model.pkl`` as the published program saves it, float32, in the place of any file of that name.

    Adapter scales other than the published program's (1 and 8 / rank) go into ``lora_B``. The file appears
    whole or not at all. Raises CheckpointError for weights that the program cannot hold and for a folder or
    disk that does not take the file.
    """
    path = Path(path)
    layout = weights.layout
    lacking = [vae for direction in DIRECTIONS for vae in VAES[direction] if vae not in layout.vaes]
    if lacking:
        raise CheckpointError(
            f"{path}: cannot be written, as these weights ({weights.source}) lack {', '.join(lacking)} of "
            "the four VAEs that the published program loads; export weights of both directions with local "
            "encoders"
        )
    if min(layout.rank_unet, layout.rank_vae) < 1:
        raise CheckpointError(
            f"{path}: cannot be written, as these weights have no adapters; export the weights before a merge"
        )
    sections = _sections(layout)
    # One tensor for a name that stands in two sections: torch saves a storage once.
    names = dict.fromkeys(name for keys in sections.values() for name in keys.values())
    tensors = {name: _stored(weights, name) for name in names}
    filled: dict[str, dict[str, Tensor]] = {}
    for entry, keys in sections.items():
        kind = OrderedDict if entry in _ORDERED else dict
        filled[entry] = kind((key, tensors[name]) for key, name in keys.items())
    _save(_in_order(layout, filled), sum(tensor.nbytes for tensor in tensors.values()), path)


def _stored(weights: TurboWeights, name: str) -> Tensor:
    tensor = weights.tensors[name].detach().cpu().float().contiguous()
    if name.endswith(".lora_B.weight"):
        is_unet = name.startswith("unet.")
        theirs = 1.0 if is_unet else VAE_ALPHA / weights.layout.rank_vae
        tensor = _times(tensor, (weights.unet_scale if is_unet else weights.vae_scale) / theirs)
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()  # of a view, torch saves all of the storage behind it


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _save(checkpoint: Mapping[str, Any], size: int, path: Path) -> None:
    """Under another name first, so that ``path`` is the old file or the whole new one."""
    try:
        _refuse_place(path, size)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({_reason(error)}); it takes {size / 1e6:.1f} MB: make space or "
            "choose another folder"
        ) from error


def _refuse_place(path: Path, size: int) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"there is no folder {path.parent}")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, f"only {free / 1e6:.1f} MB are free")


def _reason(error: BaseException) -> str:
    """The system's own words: torch's zip writer puts a RuntimeError in front of a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0][:120]
