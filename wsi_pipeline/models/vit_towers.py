"""Vision transformers as feature towers: CONCH, any ViT of timm, any ViT of open_clip; built, filled, tapped.

Taps are blocks 4, 8 and 11 (from 0) of 12, and blocks ``depth * 5 // 12 - 1``, ``depth * 9 // 12 - 1`` and
the last one of any other depth: raw outputs, no final norm; class and register tokens are taken off the maps.

Why position embeddings are resampled once, when a file is read: grids are square and of one size, so doing
it in each pass (as timm's dynamic sizes do) would give the same numbers later. Bicubic with antialiasing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.checkpoint_file import few, read_checkpoint
from wsi_pipeline.models.tensor_file import StoredTensors, read_header

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "CONCH_LICENCE",
    "Features",
    "Level2",
    "Tower",
    "conch_tower",
    "open_clip_tower",
    "tap_blocks",
    "timm_tower",
]

Level2: TypeAlias = Literal["cls", "first_patch"]
Features: TypeAlias = tuple[Tensor, Tensor, Tensor]
State: TypeAlias = Mapping[str, Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_KEY = "objective.adversarial.backbone.weights"
CONCH_LICENCE = (
    "CC-BY-NC-ND 4.0: no commercial use; its terms count models trained on CONCH's outputs as derivatives"
)
_CONCH_REMEDY = (
    "ask for access at https://huggingface.co/MahmoodLab/CONCH, download pytorch_model.bin and name it as "
    f"{_KEY} ({CONCH_LICENCE})"
)
_CONCH_PREFIX = "visual.trunk."
_PICKLE_KEYS = ("state_dict", "model")

_AFTER_TAPS = ("norm.", "fc_norm.", "head.", "head_dist.", "attn_pool.")
"""Beginnings of names in timm that no tap needs; files may have them or not."""


class Tower(NamedTuple):
    """A network from normalised images [B, 3, side, side] to ``Features``, all levels ``width`` wide.

    ``mean``, ``std``: of the pixels in [0, 1] that it was trained on.
    """

    network: nn.Module
    width: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def tap_blocks(depth: int) -> tuple[int, int, int]:
    """The three blocks that are tapped, from 0; 4, 8, 11 of 12."""
    return max(0, depth * 5 // 12 - 1), max(0, depth * 9 // 12 - 1), depth - 1


def conch_tower(weights: Path | None, model: str, side: int, level2: Level2) -> Tower:
    """CONCH's visual trunk (Lu et al., Nature Medicine 2024): a ViT-B/16 with exactly 150 tensors.

    ``weights``: the published ``pytorch_model.bin``, or the trunk alone under timm's names.
    """
    from timm.models.vision_transformer import VisionTransformer

    state = _read_state(weights, "CONCH's weights", _CONCH_REMEDY)
    trunk = VisionTransformer(
        img_size=side,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
    )
    if any(name.startswith(_CONCH_PREFIX) for name in state):
        state = _under(state, _CONCH_PREFIX)
    _fill(trunk, state, weights, "CONCH's visual trunk", _CONCH_REMEDY)
    return Tower(_TimmTaps(trunk, level2), trunk.embed_dim)


def timm_tower(weights: Path | None, model: str, side: int, level2: Level2) -> Tower:
    """A vision transformer of timm by its name, filled from the user's file (timm's names)."""
    remedy = f"save timm's {model} with its weights and name the file as {_KEY}"
    trunk, state = _timm_trunk(model, side, _read_state(weights, f"weights of {model}", remedy))
    _fill(trunk, _without_rest(state), weights, model, remedy, _AFTER_TAPS)
    return _timm_parts(trunk, level2)


def open_clip_tower(weights: Path | None, model: str, side: int, level2: Level2) -> Tower:
    """The image tower of an open_clip model by its name, filled from the user's file (``visual.*``)."""
    import open_clip
    from open_clip.model import _build_vision_tower

    if model not in open_clip.list_models():
        raise ConfigError(f"backbone.model: open_clip has no {model!r}; see open_clip.list_models()")
    config = open_clip.get_model_config(model)
    remedy = f"save the state of open_clip's {model} and name the file as {_KEY}"
    state = _read_state(weights, f"weights of {model}", remedy)
    if any(name.startswith("visual.") for name in state):
        state = _under(state, "visual.")
    if timm_name := config["vision_cfg"].get("timm_model_name"):
        trunk, state = _timm_trunk(timm_name, side, _under(state, "trunk."))
        _fill(trunk, _without_rest(state), weights, model, remedy, _AFTER_TAPS)
        return _timm_parts(trunk, level2)
    vision = config["vision_cfg"] | {"image_size": side}
    visual = _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))
    if not hasattr(visual, "transformer"):
        raise ConfigError(f"backbone.model: {model} is no vision transformer; choose a ViT")
    _fill(visual, state, weights, model, remedy)
    return Tower(_OpenClipTaps(visual, level2), visual.conv1.out_channels)


class _TimmTaps(nn.Module):
    def __init__(self, trunk: Any, level2: Level2) -> None:
        super().__init__()
        self.trunk = trunk
        self.level2 = level2
        self.blocks = tap_blocks(len(trunk.blocks))

    def forward(self, x: Tensor) -> Features:
        tokens = self.level2 == "cls"
        taps = self.trunk.forward_intermediates(
            x, indices=list(self.blocks), return_prefix_tokens=tokens, intermediates_only=True
        )
        if not tokens:
            return _at_blocks(taps, None)
        maps, prefixes = zip(*taps, strict=True)
        return _at_blocks(maps, prefixes[-1])


class _OpenClipTaps(nn.Module):
    def __init__(self, visual: Any, level2: Level2) -> None:
        super().__init__()
        self.visual = visual
        self.level2 = level2
        self.blocks = tap_blocks(len(visual.transformer.resblocks))

    def forward(self, x: Tensor) -> Features:
        taps = self.visual.forward_intermediates(
            x, indices=list(self.blocks), intermediates_only=True, output_extra_tokens=True
        )
        prefix = taps["image_intermediates_prefix"][-1]
        return _at_blocks(taps["image_intermediates"], prefix if self.level2 == "cls" else None)


def _at_blocks(maps: Any, prefix: Tensor | None) -> Features:
    """Of networks too shallow for three depths, maps come once for each different block."""
    return maps[0], maps[max(0, len(maps) - 2)], maps[-1][:, :, 0, 0] if prefix is None else prefix[:, 0]


def _timm_trunk(name: str, side: int, state: State) -> tuple[Any, State]:
    """An empty trunk of timm, with layer scale where the file has some."""
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"backbone.model: timm has no {name!r}; see timm.list_models('vit*')")
    scaled = {"init_values": 1.0} if "blocks.0.ls1.gamma" in state else {}
    try:
        trunk = timm.create_model(name, pretrained=False, num_classes=0, img_size=side, **scaled)
    except TypeError as error:  # convolutional networks know no img_size
        raise ConfigError(f"backbone.model: {name} is no vision transformer; choose a ViT") from error
    if not all(hasattr(trunk, part) for part in ("blocks", "pos_embed", "num_prefix_tokens")):
        raise ConfigError(f"backbone.model: {name} is no plain vision transformer; choose a ViT")
    return trunk, state


def _timm_parts(trunk: Any, level2: Level2) -> Tower:
    if level2 == "cls" and getattr(trunk, "cls_token", None) is None:
        raise ConfigError("backbone.level2: this model has no class token; choose first_patch")
    made_for = trunk.pretrained_cfg
    return Tower(_TimmTaps(trunk, level2), trunk.embed_dim, tuple(made_for["mean"]), tuple(made_for["std"]))


def _read_state(path: Path | None, what: str, remedy: str) -> State:
    """Tensors of a safetensors file or of a pickled state, also one level deep; nothing in it is run."""
    if path is None:
        raise CheckpointError(f"{_KEY}: {what} are missing, nothing is downloaded; {remedy}")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not there, {what} are missing; {remedy}")
    if path.suffix == ".safetensors":
        header = read_header(path, remedy)
        return dict(StoredTensors({name: (path, name) for name in header.shapes}))
    state = read_checkpoint(path)
    for key in _PICKLE_KEYS:
        if isinstance(state.get(key), dict):
            state = state[key]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _without_rest(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith(_AFTER_TAPS)}


def _fill(
    network: Any, state: State, path: Path | None, what: str, remedy: str, optional: tuple[str, ...] = ()
) -> None:
    """Load a state that must have every tensor of the network (but ``optional`` ones) and no other."""
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith(optional)}
    state = _resampled(state, wanted)
    kinds = {
        "missing": [name for name in wanted if name not in state],
        "extra": [name for name in state if name not in wanted],
        "of another shape": [n for n, v in wanted.items() if n in state and state[n].shape != v.shape],
    }
    said = [f"{len(names)} {kind} ({few(names)})" for kind, names in kinds.items() if names]
    if said:
        raise CheckpointError(f"{path}: does not fit {what}: of {len(wanted)}, {', '.join(said)}; {remedy}")
    network.load_state_dict(state, strict=not optional)


def _resampled(state: State, wanted: State) -> State:
    """Position embeddings on the network's grid; rows of class and register tokens are left alone."""
    from timm.layers import resample_abs_pos_embed

    changed = dict(state)
    for name in ("pos_embed", "positional_embedding"):
        if name not in state or name not in wanted or state[name].shape == wanted[name].shape:
            continue
        table = state[name].float()
        rows = table[None] if table.dim() == 2 else table
        new_rows = wanted[name].shape[-2]
        side = int(new_rows**0.5)
        extra = new_rows - side**2
        if int((rows.shape[1] - extra) ** 0.5) ** 2 == rows.shape[1] - extra:
            rows = resample_abs_pos_embed(rows, [side, side], num_prefix_tokens=extra)
            changed[name] = rows[0] if table.dim() == 2 else rows
    return changed
