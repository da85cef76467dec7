"""The two checkpoint formats of img2img-turbo, and what Diffusion-FFPE's shares with the first of them.

Source: Parmar et al., "One-Step Image Translation with Text-to-Image Models" (2024). CycleGAN-turbo stores
whole autoencoders and one dictionary of adapters for each part of the UNet; pix2pix-turbo stores what was
trained, in one dictionary for each network. Neither has local encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.base_model import Base
from wsi_pipeline.models.checkpoint_file import Part, check_fit, few, read_part
from wsi_pipeline.models.layout import ADAPTERS, VAES, Layout, Shape
from wsi_pipeline.models.weights import Imported

__all__ = [
    "CYCLEGAN_LISTS",
    "VAE_ALPHA",
    "VAE_SECTIONS",
    "import_cyclegan",
    "import_pix2pix",
    "import_sections",
    "layout_of",
    "lora_sections",
]

VAE_ALPHA = 8.0
"""peft's default alpha, which these programs leave to the adapters of the VAE: their scale is 8 / rank."""

_UNET_SECTIONS = dict(zip(ADAPTERS, ("sd_encoder", "sd_decoder", "sd_other"), strict=True))

VAE_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "sd_vae_enc": ("vae", "vae_patch", "vae_b2a", "vae_b2a_patch"),
    "sd_vae_dec": ("vae", "vae_b2a", "vae_patch", "vae_b2a_patch"),
}
"""Both hold the same tensors, in another order: the published wrappers share their modules."""

CYCLEGAN_LISTS = (
    *("l_target_modules_encoder", "l_target_modules_decoder", "l_modules_others"),
    "vae_lora_target_modules",
)
"""Keys that tell a CycleGAN-turbo file from one of Diffusion-FFPE."""

_TWIN = ("conv_in_pretrained", "conv_in_curr")


def lora_sections(layout: Layout) -> dict[str, dict[str, str]]:
    """Dictionary of the file -> its keys, in saved order -> canonical names.

    Keys of the UNet are without the adapter's name, keys of the VAEs are with it, as the programs save them.
    """
    sections: dict[str, dict[str, str]] = {entry: {} for entry in _UNET_SECTIONS.values()}
    for module, adapter in layout.unet_adapted.items():
        for matrix in ("lora_A", "lora_B"):
            key = f"{module}.{matrix}.weight"
            sections[_UNET_SECTIONS[adapter]][key] = f"unet.{key}"
    for entry, order in VAE_SECTIONS.items():
        sections[entry] = {
            f"{vae}.{key}": f"{vae}.{name}"
            for vae in order
            if vae in layout.vaes
            for key, name in _vae_keys(layout).items()
        }
    return sections


def _vae_keys(layout: Layout) -> dict[str, str]:
    """peft's key of one VAE -> diffusers' key; adapters follow the layer they adapt."""
    adapted = set(layout.vae_adapted)
    keys = {}
    for module, names in groupby(layout.vae_base, key=lambda name: name.rpartition(".")[0]):
        for name in names:
            leaf = name.rpartition(".")[2]
            keys[f"{module}.base_layer.{leaf}" if module in adapted else name] = name
        if module in adapted:
            keys |= {f"{module}.lora_{m}.vae_skip.weight": f"{module}.lora_{m}.weight" for m in "AB"}
    return keys


def layout_of(checkpoint: Mapping[str, Any], base: Base, vaes: tuple[str, ...], source: str) -> Layout:
    """The layout of a file: ranks that it states, networks of the base, whose own tensors are checked."""
    layout = Layout(
        unet_config=base.unet_config,
        vae_config=base.vae_config,
        rank_unet=_rank(checkpoint, "rank_unet", source),
        rank_vae=_rank(checkpoint, "rank_vae", source),
        vaes=vaes,
    )
    try:
        unet_base, vae_base = layout.unet_base, layout.vae_base
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise CheckpointError(
            f"{base.name}: its configuration describes no UNet and VAE of SD-Turbo's kind "
            f"({few(str(error).splitlines()[:1])}); import with the base that the file was trained on"
        ) from error
    stock_vae = {key: shape for key, shape in vae_base.items() if ".skip_conv_" not in key}
    own = (
        Part(entry="unet", found=base.unet, wanted=unet_base),
        Part(entry="vae", found=base.vae, wanted=stock_vae),
    )
    check_fit(own, (), f"{base.name} (the base's own weights)", base.name)
    return layout


def _rank(checkpoint: Mapping[str, Any], key: str, source: str) -> int:
    rank = checkpoint.get(key)
    if type(rank) is not int or rank < 1:
        told = "is missing" if key not in checkpoint else f"is not a positive number ({few([repr(rank)])})"
        raise CheckpointError(f"{source}: {key} {told}; download it again, or name the generator's file")
    return rank


def import_sections(
    checkpoint: Mapping[str, Any],
    base: Base,
    source_name: str,
    layout: Layout,
    sections: Mapping[str, Mapping[str, str]],
    *,
    known: Iterable[str],
    kind: str,
) -> Imported:
    """A file of dictionaries ``sections``; of two that hold a tensor the later one counts, as published.

    ``known``: other keys of the file that need no notice.
    """
    shapes = layout.canonical()
    parts = [
        read_part(checkpoint, entry, _prefix(entry), {n: shapes[n] for n in names.values()}, source_name)
        for entry, names in sections.items()
    ]
    extra, ignored = _unknown(checkpoint, {*sections, *known, "rank_unet", "rank_vae"})
    check_fit(parts, extra, source_name, base.name)
    found, notices = _merged(parts)
    tensors = {f"unet.{key}": tensor for key, tensor in base.unet.items()} | found
    return Imported(
        layout=layout,
        tensors={name: tensors[name].detach() for name in shapes},
        unet_scale=1.0,  # alpha is set to the rank
        vae_scale=VAE_ALPHA / layout.rank_vae,
        source=kind,
        notices=(*ignored, *notices, *_changed_vae(found, layout, base)),
    )


def _prefix(entry: str) -> str:
    if entry == "unet_conv_in":
        return "unet.conv_in."
    return "" if entry in VAE_SECTIONS else "unet."


def _unknown(checkpoint: Mapping[str, Any], known: set[str]) -> tuple[list[str], list[str]]:
    """Keys with tensors that nobody would read, and a notice of those without."""
    unknown = [key for key in checkpoint if key not in known]
    extra = [key for key in unknown if _holds_tensors(checkpoint[key])]
    plain = [key for key in unknown if key not in extra]
    return extra, [f"entries of the file that are not used: {few(plain)}"] if plain else []


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _merged(parts: Sequence[Part]) -> tuple[dict[str, Tensor], list[str]]:
    merged: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    notices = []
    for part in parts:
        found = part.found or {}
        differ = [n for n in found if n in merged and not _equal(merged[n], found[n])]
        for other in dict.fromkeys(owner[name] for name in differ):
            names = [name for name in differ if owner[name] == other]
            notices.append(
                f"{other} and {part.entry} differ in {len(names)} of their tensors ({few(names)}): "
                f"{part.entry} is used"
            )
        merged |= found
        owner |= dict.fromkeys(found, part.entry)
    return merged, notices


def _changed_vae(found: Mapping[str, Tensor], layout: Layout, base: Base) -> list[str]:
    names = [
        f"{vae}.{key}"
        for vae in layout.vaes
        for key, tensor in base.vae.items()
        if not _equal(found[f"{vae}.{key}"], tensor)
    ]
    if not names:
        return []
    total = len(layout.vaes) * len(base.vae)
    doubt = (
        f"; {base.name} is probably not the base it was trained on, then the output is wrong: check --base"
    )
    return [
        f"the file's VAE differs from base {base.name} in {len(names)} of {total} tensors ({few(names)}): "
        f"weights of the file are used{doubt if len(names) == total else ''}"
    ]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal in the narrower of both dtypes: a file in half precision is no other model."""
    if one.data_ptr() == other.data_ptr() and one.dtype == other.dtype and one.stride() == other.stride():
        return True
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return bool(torch.equal(one.to(narrow), other.to(narrow)))


def import_cyclegan(checkpoint: Mapping[str, Any], base: Base, source_name: str) -> Imported:
    """Both directions of a CycleGAN-turbo file, whole tile only."""
    layout = layout_of(checkpoint, base, (VAES["a2b"][0], VAES["b2a"][0]), source_name)
    imported = import_sections(
        checkpoint,
        base,
        source_name,
        layout,
        lora_sections(layout),
        known=CYCLEGAN_LISTS,
        kind="cyclegan-turbo",
    )
    notice = f"the format does not store the trained base of conv_in: that of {base.name} is used"
    return replace(imported, notices=(*imported.notices, notice))


def import_pix2pix(checkpoint: Mapping[str, Any], base: Base, source_name: str) -> Imported:
    """The one direction (``a2b``) of a pix2pix-turbo file, whole tile only.

    The file holds the UNet's conv_in whole, the skip convolutions, and adapters of the modules that it lists.
    """
    unet = checkpoint.get("state_dict_unet")
    if isinstance(unet, Mapping) and any(
        "conv_in_pretrained" in key or "conv_in_curr" in key for key in unet
    ):
        raise CheckpointError(
            f"{source_name}: holds a twin conv_in, blended at run time (the stochastic sketch model), which "
            "is not supported; import a pix2pix-turbo file with one conv_in"
        )
    (vae,) = vaes = VAES["a2b"][:1]
    layout = layout_of(checkpoint, base, vaes, source_name)
    shapes = layout.canonical()
    whole = {f"unet.conv_in.{leaf}": shapes[f"unet.conv_in.{leaf}"] for leaf in ("weight", "bias")}
    skips = {name: shape for name, shape in shapes.items() if ".skip_conv_" in name and ".lora_" not in name}
    parts = [
        _listed_part(checkpoint, "unet", "unet.", whole, layout.unet_adapted, shapes, source_name),
        _listed_part(checkpoint, "vae", f"{vae}.", skips, layout.vae_adapted, shapes, source_name),
    ]
    lists = ("unet_lora_target_modules", "vae_lora_target_modules")
    extra, ignored = _unknown(
        checkpoint, {"rank_unet", "rank_vae", "state_dict_unet", "state_dict_vae", *lists}
    )
    check_fit(parts, extra, source_name, base.name)
    found, notices = _merged(parts)
    # Why zeros: modules that the file does not adapt (conv_in, as a rule) keep the one layout of all formats,
    # and an adapter of zeros adds nothing.
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if ".lora_" in name}
    tensors |= {f"unet.{key}": tensor for key, tensor in base.unet.items()}
    tensors |= {f"{vae}.{key}": tensor for key, tensor in base.vae.items()}
    tensors |= found
    return Imported(
        layout=layout,
        tensors={name: tensors[name].detach() for name in shapes},
        unet_scale=VAE_ALPHA / layout.rank_unet,
        vae_scale=VAE_ALPHA / layout.rank_vae,
        source="pix2pix-turbo",
        notices=(*ignored, *notices),
    )


def _listed_part(
    checkpoint: Mapping[str, Any],
    network: str,
    prefix: str,
    whole: Mapping[str, Shape],
    adapted: Iterable[str],
    shapes: Mapping[str, Shape],
    source: str,
) -> Part:
    """What ``state_dict_<network>`` holds; wanted are adapters of modules that it lists or holds in part."""
    targets = checkpoint.get(f"{network}_lora_target_modules")
    if not isinstance(targets, list | tuple | set) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(
            f"{source}: {network}_lora_target_modules is no list of module names; "
            "download it again, or name the generator's file"
        )
    ends = tuple(f".{target}" for target in targets)
    part = read_part(checkpoint, f"state_dict_{network}", prefix, whole, source)
    wanted = dict(whole)
    for module in adapted:
        pair = [f"{prefix}{module}.lora_{matrix}.weight" for matrix in "AB"]
        if f".{module}".endswith(ends) or any(name in (part.found or {}) for name in pair):
            wanted |= {name: shapes[name] for name in pair}
    return Part(entry=part.entry, found=part.found, wanted=wanted, twice=part.twice)
