"""U-Nets of ADM and WDM against published numbers, and full-size networks against published names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import parity_other as other
import pytest
import torch
from torch import Tensor, nn

from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.networks import build_network
from wsi_pipeline.models.pix2pix import PatchGAN
from wsi_pipeline.translators.bundle import build_translator
from wsi_pipeline.translators.importers import AdmOptions, BridgeOptions, import_translator

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 5e-5
FIRST = "input_blocks.0.0.weight"


def loaded(state: dict[str, Any], kind: Any, options: Any, folder: Path) -> nn.Module:
    path = folder / "weights.pt"
    path.unlink(missing_ok=True)
    torch.save(state, path)
    found = import_translator(path, kind=kind, options=options)
    network: nn.Module = build_translator(found.spec, found.tensors)
    return network


def mult(config: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(times) for times in config["channel_mult"].split(","))


@torch.no_grad()
def test_adm_u_nets_have_parity_after_import(other_set: Path, tmp_path: Path) -> None:
    recorded, told = other.arrays(other_set, "adm_unet"), other.facts(other_set, "adm_unet")
    state = other.weights(other_set, told["shapes"], told["salt"])
    plain = {key: tensor for key, tensor in state.items() if not key.startswith("label_emb")}
    width = told["config"]["num_head_channels"]
    x, t, fraction = (torch.from_numpy(recorded[name]).float() for name in ("x", "t_int", "t_frac"))

    def same(made: Tensor, name: str) -> None:
        other.close(made, recorded[name], LIMIT, name)

    network = loaded(state, "adm", AdmOptions(head_width=width), tmp_path)
    label, another = (torch.from_numpy(recorded[name]) for name in ("y", "class_cond.other_label"))
    same(network(x, t, label), "class_cond.out")
    same(network(x, fraction, label), "class_cond.out_t_frac")
    same(network(x, t, another), "class_cond.out_other_label")
    same(network(x, t), "uncond.out")  # the added class, whose embedding is zero
    network = loaded(plain, "adm", AdmOptions(head_width=width), tmp_path)
    same(network(x, t), "uncond.out")
    same(network(x, fraction), "uncond.out_t_frac")
    for case in other.prefixes(recorded, "uncond.num_heads", ".out"):
        heads = int(case.removeprefix("uncond.num_heads"))
        same(loaded(plain, "adm", AdmOptions(heads=heads), tmp_path)(x, t), f"{case}.out")
    options = AdmOptions(head_width=width, new_attention_order=True)
    same(loaded(plain, "adm", options, tmp_path)(x, t), "uncond.new_attention_order.out")


@torch.no_grad()
def test_bridges_have_parity_after_import_of_averages(other_set: Path, tmp_path: Path) -> None:
    recorded, told = other.arrays(other_set, "adm_unet"), other.facts(other_set, "adm_unet")
    shapes = {key: shape for key, shape in told["shapes"].items() if not key.startswith("label_emb")}
    shapes |= {key: shape for key, shape in told["bridge_shapes"].items() if " " not in key}
    width = told["config"]["num_head_channels"]
    x, x1, t = (torch.from_numpy(recorded[name]) for name in ("x", "x1", "t_frac"))
    for name, inputs in (("bridge", x), ("bridge_cond_x1", torch.cat([x, x1], dim=1))):
        cond = name.endswith("x1")
        if cond:
            shapes[FIRST] = told["bridge_shapes"][f"cond_x1 {FIRST}"]
        state = other.weights(other_set, shapes, told["salt"])
        checkpoint = {
            "net": {f"diffusion_model.{key}": torch.zeros_like(tensor) for key, tensor in state.items()},
            "ema": {"decay": 0.99, "num_updates": 1, "shadow_params": list(state.values())},
        }
        network = loaded(checkpoint, "i2sb", BridgeOptions(head_width=width, cond_x1=cond), tmp_path)
        other.close(network(inputs, t), recorded[f"{name}.out"], LIMIT, name)
    state = other.weights(other_set, told["shapes"], told["salt"])
    network = loaded(state, "i2sb", BridgeOptions(head_width=width, cond_x1=True), tmp_path)
    t = torch.from_numpy(recorded["t_int"]).float()
    other.close(network(torch.cat([x, x1], 1), t), recorded["uncond.out"][:, :3], LIMIT, "to begin with")


@torch.no_grad()
def test_wdm_u_nets_have_parity(other_set: Path) -> None:
    recorded, told = other.arrays(other_set, "wdm_unet"), other.facts(other_set, "wdm_unet")
    for name, case in told.items():
        settings = case["config"]
        taken, given = settings["in_channels"], settings["out_channels"]
        network = build_network(wdm(settings), in_channels=taken, out_channels=given).eval()
        assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == case["shapes"]
        network.load_state_dict(other.weights(other_set, case["shapes"], case["salt_of_weights"]))
        parts = {"encoder_1": network.input_blocks[1], "middle": network.middle_block[-1]}
        parts["decoder_first"] = network.output_blocks[0]
        inner: dict[str, Tensor] = {}
        for part, module in parts.items():
            last = module if part == "middle" else module[-1]
            last.register_forward_hook(functools.partial(keep, inner, part))
        source = name if f"{name}.x" in recorded else name.partition("_")[0]  # wdm_concat sees what wdm saw
        x, t = (torch.from_numpy(recorded[f"{source}.{what}"]) for what in ("x", "t"))
        other.close(network(x, t.float()), recorded[f"{name}.out"], LIMIT, name)
        for part, made in inner.items():
            if f"{name}.{part}" in recorded:
                other.close(made, recorded[f"{name}.{part}"], LIMIT, f"{name}.{part}")


def keep(into: dict[str, Tensor], name: str, module: nn.Module, taken: Any, made: Tensor) -> None:
    into[name] = made


def wdm(settings: dict[str, Any]) -> NetworkConfig:
    return NetworkConfig(
        family="unet3d",
        base=settings["num_channels"],
        mult=mult(settings),
        blocks=settings["num_res_blocks"],
        groups=settings["num_groups"],
        scale_shift=settings["use_scale_shift_norm"],
        additive_skips=settings["additive_skips"],
    )


LEVELS = (1, 2, 4, 8, 8, 8, 8, 8)
FULL: dict[str, tuple[dict[str, Any], int, int]] = {
    "wdm_128": ({"family": "unet3d", "mult": (1, 2, 2, 4, 4), "additive_skips": True}, 8, 8),
    "wdm_256": ({"family": "unet3d", "mult": (1, 2, 2, 4, 4, 4), "additive_skips": True}, 8, 8),
    "cwdm_224": ({"family": "unet3d", "mult": (1, 2, 2, 4, 4)}, 32, 8),
    "pix2pix_unet256_ngf64_batch": ({"family": "pix2pix", "mult": LEVELS, "norm": "batch"}, 3, 3),
    "pix2pix_unet256_ngf64_instance": ({"family": "pix2pix", "mult": LEVELS, "norm": "instance"}, 3, 3),
    "pix2pix_unet512_ngf64_batch": ({"family": "pix2pix", "mult": (*LEVELS, 8), "norm": "batch"}, 3, 3),
    "pix2pix_resnet9_ngf64_instance": ({"family": "resnet", "blocks": 9, "norm": "instance"}, 3, 3),
}


def test_full_networks_have_parity_of_names_shapes_and_counts(other_set: Path) -> None:
    told = other.facts(other_set, "keys_full")
    with torch.device("meta"):  # no memory
        made = {
            name: build_network(NetworkConfig(**settings), in_channels=taken, out_channels=given)
            for name, (settings, taken, given) in FULL.items()
            if name in told["models"]
        }
        if "pix2pix_patchgan_ndf64_batch" in told["models"]:
            made["pix2pix_patchgan_ndf64_batch"] = PatchGAN()
    assert made
    for name, network in made.items():
        found = [(key, list(tensor.shape)) for key, tensor in network.state_dict().items()]
        assert found == list(told["models"][name].items()), name
        assert sum(p.numel() for p in network.parameters()) == told["parameter_counts"][name], name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adm_256_uncond", "adm_256_class_cond", "p2_light_256", "adm_128_class_cond", "i2sb_256_cond_x1"]
)
def test_full_adm_files_have_parity_of_shapes_after_import(
    name: str, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importer renames tensors without memory, and every one finds its place in diffusers' network."""
    told = other.facts(other_set, "keys_full")
    if name not in told["models"]:
        pytest.skip(f"the set has no {name}")
    shapes = told["models"][name]
    state: dict[str, Any] = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    heads = {"heads": 4} if name.startswith("adm_128") else {}
    kind: Any = "i2sb" if name.startswith("i2sb") else "adm"
    options: Any = (
        BridgeOptions(cond_x1=name.endswith("x1"), **heads) if kind == "i2sb" else AdmOptions(**heads)
    )
    if kind == "i2sb":
        state = {"net": {f"diffusion_model.{key}": tensor for key, tensor in state.items()}}
    monkeypatch.setattr("wsi_pipeline.translators.importers.read_checkpoint", lambda path: state)
    found = import_translator("full.pt", kind=kind, options=options)
    added = shapes["label_emb.weight"][1] if "label_emb.weight" in shapes else 0  # no label
    count = sum(tensor.numel() for tensor in found.tensors.values())
    assert count == told["parameter_counts"][name] + added
