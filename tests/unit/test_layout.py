"""Names and counts of the full-size generator, on the meta device: the totals of the specification (T1)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wsi_pipeline.models.layout import ADAPTERS, SD_TURBO_UNET, SD_TURBO_VAE, VAES, Layout, Shape

ALL_VAES = tuple(name for pair in VAES.values() for name in pair)


@pytest.fixture(scope="module")
def full() -> Layout:
    return Layout(
        unet_config=SD_TURBO_UNET, vae_config=SD_TURBO_VAE, rank_unet=128, rank_vae=4, vaes=ALL_VAES
    )


def unet_adapter(layout: Layout, adapter: str) -> dict[str, Shape]:
    return {
        f"{module}.{matrix}": shape
        for module, owner in layout.unet_adapted.items()
        if owner == adapter
        for matrix, shape in layout.lora("unet", module).items()
    }


def vae_adapters(layout: Layout, part: str = "") -> dict[str, Shape]:
    return {
        f"{module}.{matrix}": shape
        for module in layout.vae_adapted
        if module.startswith(part)
        for matrix, shape in layout.lora("vae", module).items()
    }


def test_bases_have_the_size_of_sd_turbo(full: Layout) -> None:
    assert (len(full.unet_base), full.count(full.unet_base)) == (686, 865_910_724)
    stock = {key: shape for key, shape in full.vae_base.items() if ".skip_conv_" not in key}
    assert (len(stock), full.count(stock)) == (248, 83_653_863)
    parts = {"encoder": 34_163_592, "decoder": 49_490_179, "quant_conv": 72, "post_quant_conv": 20}
    for part, size in parts.items():
        assert full.count({k: s for k, s in stock.items() if k.startswith(f"{part}.")}) == size


@pytest.mark.parametrize(
    ("adapter", "modules", "at_128", "at_8"),
    [
        ("default_encoder", 94, 40_120_832, 2_507_552),
        ("default_decoder", 147, 77_234_176, 4_827_136),
        ("default_others", 17, 12_427_776, 776_736),
    ],
)
def test_unet_adapters(full: Layout, adapter: str, modules: int, at_128: int, at_8: int) -> None:
    shapes = unet_adapter(full, adapter)
    assert (len(shapes), full.count(shapes)) == (2 * modules, at_128)
    small = Layout(unet_config=SD_TURBO_UNET, vae_config=SD_TURBO_VAE, rank_unet=8, rank_vae=4, vaes=ALL_VAES)
    assert small.count(unet_adapter(small, adapter)) == at_8


def test_vae_adapters_and_skips(full: Layout) -> None:
    assert (len(full.vae_adapted), full.count(vae_adapters(full))) == (74, 893_224)
    assert (len(vae_adapters(full, "encoder.")), len(vae_adapters(full, "decoder."))) == (62, 86)
    assert full.count(vae_adapters(full, "encoder.")) == 369_292
    assert not vae_adapters(full, "quant_conv") and not vae_adapters(full, "post_quant_conv")
    skips = [full.vae_base[f"decoder.skip_conv_{k}.weight"] for k in range(1, 5)]
    assert skips == [(512, 512, 1, 1), (512, 256, 1, 1), (512, 128, 1, 1), (256, 128, 1, 1)]


def test_one_vae_of_a_file_and_what_is_trained(full: Layout) -> None:
    names = full.canonical()
    vae = {name: shape for name, shape in names.items() if name.startswith("vae_b2a.")}
    assert (len(vae), full.count(vae)) == (400, 85_038_607)
    loras = sum(full.count(unet_adapter(full, adapter)) for adapter in ADAPTERS)
    conv_in = full.count({name: names[f"unet.conv_in.{name}"] for name in ("weight", "bias")})
    assert (loras, loras + conv_in) == (129_782_784, 129_794_624)
    assert loras + conv_in + 2 * full.count(vae_adapters(full)) == 131_581_072
    assert len(names) == 686 + 2 * 258 + 4 * 400


def test_modules_without_adapters(full: Layout) -> None:
    assert not [name for name in full.unet_adapted if "time_emb" in name or "norm" in name]
    assert [name for name in full.unet_adapted if "." not in name] == ["conv_in", "conv_out"]
    assert full.lora("unet", "conv_in") == {"lora_A": (128, 4, 3, 3), "lora_B": (320, 128, 1, 1)}
    linear = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert full.lora("unet", linear) == {"lora_A": (128, 1024), "lora_B": (320, 128)}


def test_parity_counts_of_the_published_program(parity_set: Path) -> None:
    recorded = json.loads((parity_set / "keys_full.json").read_text(encoding="utf-8"))
    counts, saved = recorded["counts"], recorded["model_pkl"]
    layout = Layout(
        unet_config=SD_TURBO_UNET,
        vae_config=SD_TURBO_VAE,
        rank_unet=saved["rank_unet"],
        rank_vae=saved["rank_vae"],
        vaes=ALL_VAES,
    )
    for adapter, entry in zip(ADAPTERS, ("sd_encoder", "sd_decoder", "sd_other"), strict=True):
        shapes = unet_adapter(layout, adapter)
        assert (layout.count(shapes), len(shapes)) == (counts[entry], counts[f"{entry}_tensors"])
    assert layout.count(layout.unet_base) == counts["unet_base"]
    assert layout.count(vae_adapters(layout)) == counts["vae_lora_per_vae"]
