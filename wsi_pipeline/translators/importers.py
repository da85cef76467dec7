"""Weights of other programs as translators: ADM's U-Net, I2SB, generators of pix2pix. No pickle is ever run.

What a network is made of is read off names and shapes; what no file states is said with options.

    adm      state dict of guided-diffusion or P2, with residual up- and downsampling
    i2sb     ``latest.pt`` {net, ema, ..}, or ADM's state dict as weights to begin with; ``options.pkl``
             beside it is not looked at
    pix2pix  ``latest_net_G.pth``: U-Net of any size, or ResNet

ADM's attention keeps query, key and value of a head together, rows [H, 3, c]; diffusers wants [3, H, c]. Its
class embedding has no row for "no label"; the one that is added is zero: as if there were no classes.
Weights to begin with lose the variances (outputs after the third), and what reads the source image beside x_n
begins at zero, so that nothing changes before training (published: random).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.checkpoint_file import few, read_checkpoint
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.translators.bundle import LEFT_OUT, TranslatorSpec, build_translator
from wsi_pipeline.translators.settings import ConditionConfig, DiffusionConfig, PathConfig, SamplingConfig

__all__ = [
    "OPTIONS",
    "AdmOptions",
    "BridgeOptions",
    "Imported",
    "Kind",
    "Pix2PixOptions",
    "import_translator",
]

Kind: TypeAlias = Literal["adm", "i2sb", "pix2pix"]
State: TypeAlias = dict[str, Tensor]

ADM_LICENCE = "guided-diffusion's code is MIT; ask the author of these weights for their licence."
I2SB_LICENCE = "I2SB's published weights are CC-BY-NC-SA 4.0: no commercial use."
PIX2PIX_LICENCE = "pix2pix's code is BSD-2-Clause; ask the author of these weights for their licence."
COLOUR = "instance norms look at each tile alone: neighbouring tiles may differ in colour"
STATISTICS = (
    "it holds running statistics of batch norms, and they are used: where the published program was tested "
    "without --eval, it took those of each image, and its colours were others"
)
CHANNELS = 3

_DECODER = re.compile(r"output_blocks\.\d+\.(\d)\.in_layers\.0\.weight")
_LAYER = re.compile(r"(input|output|middle)_blocks?\.(\d+)\.(?:(\d)\.)?(.+)")
_FIRST = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
_SECOND = {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
_RESIDUAL = _FIRST | _SECOND
_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
_TIME = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
_ENDS = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
_OUTER = {**_TIME, "label_emb": "class_embedding", **_ENDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class _UNetOptions:
    """``heads``: of each attention, 0: by ``head_width``, the channels of one; ``new_attention_order``: the
    flag of guided-diffusion; ``steps`` of the grid."""

    heads: int = 0
    head_width: int = 64
    new_attention_order: bool = False
    steps: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmOptions(_UNetOptions):
    """``schedule``: of the noise; ``classes``: names of the labels, in order."""

    schedule: Literal["linear", "cosine"] = "linear"
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeOptions(_UNetOptions):
    """What ``options.pkl`` would tell: ``beta_max``, ``ode`` (ot-ode), ``cond_x1`` (the source stands beside
    x_n)."""

    beta_max: float = 0.3
    ode: bool = False
    cond_x1: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pix2PixOptions:
    """``tanh``: whether the output is bounded, as published; no tensor tells."""

    tanh: bool = True


OPTIONS: Mapping[Kind, type[Any]] = {"adm": AdmOptions, "i2sb": BridgeOptions, "pix2pix": Pix2PixOptions}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """``tensors``: float32, by the names of the network of ``spec``; ``notices``: what users should know."""

    spec: TranslatorSpec
    tensors: State
    notices: tuple[str, ...] = ()


def import_translator(path: str | Path, *, kind: Kind, options: Any = None) -> Imported:
    """Read a checkpoint of another program; ``options``: of ``OPTIONS[kind]``, None for its defaults.

    Raises CheckpointError for a file that is unsafe, is something else or does not fit, ConfigError for
    options that contradict each other.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    readers: dict[Kind, Callable[..., Imported]] = {"adm": _adm, "i2sb": _bridge, "pix2pix": _pix2pix}
    try:
        found = readers[kind](checkpoint, options or OPTIONS[kind](), path)
        with torch.device("meta"):  # no memory, no weights
            network = build_translator(found.spec, None, "meta")
    except (LookupError, RuntimeError, ArithmeticError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{path}: holds no network of kind {kind} ({said}); choose another") from error
    wanted, made = (
        {(k, t.shape) for k, t in s.items()} for s in (_kept(network.state_dict()), found.tensors)
    )
    if wanted != made:
        lacking, odd = sorted({k for k, _ in wanted - made}), sorted({k for k, _ in made - wanted})
        raise CheckpointError(
            f"{path}: makes no {found.spec.network.family} of kind {kind}: {len(lacking)} tensors missing or "
            f"of another shape ({few(lacking)}), {len(odd)} too many ({few(odd)}); choose another file"
        )
    return found


def _kept(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if not key.endswith(LEFT_OUT)}


def _state(entries: Mapping[str, Any], path: Path) -> State:
    """Tensors as float32, without what a network is asked not to hold."""
    if odd := [key for key, value in entries.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{path}: is no state dict, it holds more than tensors ({few(odd)})")
    return {key: tensor.float() for key, tensor in _kept(entries).items()}


def _adm(checkpoint: Mapping[str, Any], options: AdmOptions, path: Path) -> Imported:
    network, tensors, notices = _unet(_state(checkpoint, path), options)
    channels, outputs = tensors["conv_in.weight"].shape[1], len(tensors["conv_out.weight"])
    known = tensors.get("class_embedding.weight", torch.empty(0))
    if len(known):
        tensors["class_embedding.weight"] = torch.cat([known, torch.zeros_like(known[:1])])
        notices.append("it has no embedding for 'no label' (zero stands for it): sample with guidance=1")
    variance: Any = "learned_range" if outputs > channels else "fixed_large"
    path_config = PathConfig(kind="vp", steps=options.steps, schedule=options.schedule, variance=variance)
    spec = TranslatorSpec(
        network=network,
        diffusion=DiffusionConfig(path=path_config, condition=ConditionConfig(classes=len(known))),
        sampling=SamplingConfig(nfe=250),
        channels=channels,
        classes=options.classes,
        source="guided-diffusion",
        licence=ADM_LICENCE,
    )
    return Imported(spec=spec, tensors=tensors, notices=tuple(notices))


def _bridge(checkpoint: Mapping[str, Any], options: BridgeOptions, path: Path) -> Imported:
    trained, wanted = "net" in checkpoint, CHANNELS * (2 if options.cond_x1 else 1)
    state = _averaged(checkpoint, path) if trained else _state(checkpoint, path)
    network, tensors, notices = _unet(state, options)
    first = tensors["conv_in.weight"]
    if not trained:
        notices.append("weights of a diffusion model, to begin training with: they translate nothing yet")
        tensors.pop("class_embedding.weight", None)
        for key in ("conv_out.weight", "conv_out.bias"):
            tensors[key] = tensors[key][:CHANNELS].clone()
        if first.shape[1] == CHANNELS < wanted:
            first = tensors["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], dim=1)
    if first.shape[1] != wanted:
        remedy = f"--set cond_x1={'false' if options.cond_x1 else 'true'}"
        raise CheckpointError(
            f"{path}: takes {first.shape[1]} channels, not {wanted}; import it with {remedy}"
        )
    beta = options.beta_max
    bridge = PathConfig(kind="bridge", steps=options.steps, beta_max=beta, ode=options.ode, parity=True)
    spec = TranslatorSpec(
        network=network,
        diffusion=DiffusionConfig(path=bridge, condition=ConditionConfig(concat=options.cond_x1)),
        source="I2SB" if trained else "guided-diffusion",
        licence=I2SB_LICENCE if trained else ADM_LICENCE,
    )
    return Imported(spec=spec, tensors=tensors, notices=tuple(notices))


def _averaged(checkpoint: Mapping[str, Any], path: Path) -> State:
    """The network of I2SB by ADM's names; its averages are a list in the order of its parameters."""
    net, averages = _state(checkpoint["net"], path), checkpoint.get("ema", {})
    shadow = averages.get("shadow_params", list(net.values())) if isinstance(averages, Mapping) else ()
    if [getattr(average, "shape", None) for average in shadow] != [tensor.shape for tensor in net.values()]:
        raise CheckpointError(f"{path}: its averages (ema) are not those of its network (net); save it again")
    return _state({k.removeprefix("diffusion_model."): v for k, v in zip(net, shadow, strict=True)}, path)


def _unet(state: State, options: _UNetOptions) -> tuple[NetworkConfig, State, list[str]]:
    """ADM's U-Net as ours: settings, tensors by diffusers' names, notices."""
    places = [found[1] for found in map(_DECODER.fullmatch, state) if found]
    levels = 1 + len(places) - places.count("0")  # all but the last end with a block that doubles the sides
    blocks = places.count("0") // levels - 1
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [len(state[f"input_blocks.{start}.0.out_layers.3.weight"]) for start in starts]
    base = len(state["input_blocks.0.0.weight"])
    network = NetworkConfig(
        family="unet2d",
        base=base,
        mult=tuple(width // base for width in widths),
        blocks=blocks,
        attention=tuple(n for n, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in state),
        heads=options.heads,
        head_width=options.head_width,
        scale_shift=len(state["input_blocks.1.0.emb_layers.1.weight"]) > widths[0],
    )
    tensors: State = {}
    for key, tensor in state.items():
        theirs, _, leaf = key.rpartition(".")
        module = _renamed(theirs, blocks)
        if module.endswith(".qkv"):
            rows = tensor.flatten(1) if leaf == "weight" else tensor
            if not options.new_attention_order:
                heads = options.heads or len(rows) // 3 // options.head_width
                rows = rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            for place, part in zip("qkv", rows.chunk(3), strict=True):
                tensors[f"{module.removesuffix('qkv')}to_{place}.{leaf}"] = part.contiguous()
        else:
            tensors[f"{module}.{leaf}"] = tensor.squeeze(-1) if ".to_out." in module else tensor
    cut = f"{options.heads} heads" if options.heads else f"heads of {options.head_width} channels"
    notice = f"attention is taken to have {cut}, which no file states; --set heads=N or head_width=N if not"
    return network, tensors, [notice] if network.attention else []


def _renamed(module: str, blocks: int) -> str:
    """ADM's name of a layer -> diffusers'; ``blocks``: residual ones a level."""
    found = _LAYER.fullmatch(module)
    if module in _OUTER or found is None:
        return _OUTER.get(module, module)
    side, number, second, layer = found.groups()
    level, place = divmod(int(number) - (side == "input"), blocks + 1)
    block = {"input": f"down_blocks.{level}", "output": f"up_blocks.{level}", "middle": "mid_block"}[side]
    if layer in _ATTENTION:
        return f"{block}.attentions.{0 if side == 'middle' else place}.{_ATTENTION[layer]}"
    part = f"resnets.{min(int(number), 1) if side == 'middle' else place}"
    if side == "input" and place == blocks:
        part = "downsamplers.0"
    elif side == "output" and second != "0":
        part = "upsamplers.0"
    return f"{block}.{part}.{_RESIDUAL.get(layer, layer)}"


def _pix2pix(checkpoint: Mapping[str, Any], options: Pix2PixOptions, path: Path) -> Imported:
    state = _state(checkpoint, path)
    is_unet = "model.model.0.weight" in state
    first = "model.model.0" if is_unet else "model.1"
    batch, biased = any(key.endswith(".running_var") for key in state), f"{first}.bias" in state
    if (
        batch == biased
    ):  # as published, batch norms have statistics, and instance norms leave convolutions a bias
        raise CheckpointError(
            f"{path}: has neither batch norms with statistics nor instance norms without (biases and "
            f"running_var: {'both' if batch else 'none'}); import one trained with --norm batch or instance"
        )
    widths, block = [len(state[f"{first}.weight"])], "model.model.1.model"
    while is_unet and f"{block}.1.weight" in state:
        widths.append(len(state[f"{block}.1.weight"]))
        block += ".3.model"
    second = state.get("model.10.conv_block.6.weight")  # where dropout has moved the second convolution to
    network = NetworkConfig(
        family="pix2pix" if is_unet else "resnet",
        base=widths[0],
        mult=tuple(width // widths[0] for width in widths) if is_unet else (1, 2, 4),
        blocks=max(1, sum(key.endswith(".conv_block.1.weight") for key in state)),
        norm="batch" if batch else "instance",
        dropout=0.5 if second is not None and second.dim() == 4 else 0.0,
        tanh=options.tanh,
    )
    channels, tile = state[f"{first}.weight"].shape[1], max(256, network.multiple)
    spec = TranslatorSpec(
        network=network, channels=channels, tile=tile, source="pix2pix", licence=PIX2PIX_LICENCE
    )
    return Imported(spec=spec, tensors=state, notices=(STATISTICS if batch else COLOUR,))
