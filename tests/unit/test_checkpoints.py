"""The formats of foreign programs, in and out: names, values, and one clear line for what does not fit."""

from __future__ import annotations

import errno
import functools
import json
import re
import resource
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models.assemble import merged_tensor
from wsi_pipeline.models.base_model import Base
from wsi_pipeline.models.layout import SD_TURBO_UNET, SD_TURBO_VAE, VAES, Layout
from wsi_pipeline.models.published import (
    export_published,
    import_checkpoint,
    import_published,
    published_layout,
)
from wsi_pipeline.models.random_weights import TINY_UNET, TINY_VAE, random_weights
from wsi_pipeline.models.weights import Imported, TurboWeights

ALL_VAES = tuple(name for pair in VAES.values() for name in pair)
SECTIONS = ("unet_conv_in", "sd_encoder", "sd_decoder", "sd_other", "sd_vae_enc", "sd_vae_dec")


def base_of(weights: TurboWeights, name: str = "tiny") -> Base:
    """The base that random weights stand on."""
    layout = weights.layout
    stock = [key for key in layout.vae_base if ".skip_conv_" not in key]
    return Base(
        name=name,
        digest="0" * 64,
        unet_config=layout.unet_config,
        vae_config=layout.vae_config,
        unet={key: weights.tensors[f"unet.{key}"] for key in layout.unet_base},
        vae={key: weights.tensors[f"vae.{key}"] for key in stock},
    )


@functools.cache
def parity_base(folder: Path) -> Base:
    parts = {}
    for part in ("unet", "vae"):
        config = json.loads((folder / "tiny-base" / part / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "tiny-base" / part / "diffusion_pytorch_model.safetensors")
        parts |= {f"{part}_config": config, part: tensors}
    return Base(name="tiny-base", digest="0" * 64, **parts)


def weights_of(imported: Imported) -> TurboWeights:
    return replace(
        random_weights(),
        layout=imported.layout,
        tensors=imported.tensors,
        unet_scale=imported.unet_scale,
        vae_scale=imported.vae_scale,
        source=imported.source,
    )


@pytest.fixture(scope="module")
def tiny() -> TurboWeights:
    drawn = random_weights(rank_unet=3, rank_vae=2)
    changed = {
        f"unet.conv_in.{leaf}": drawn.tensors[f"unet.conv_in.{leaf}"] + 1 for leaf in ("weight", "bias")
    }
    return replace(drawn, tensors={name: drawn.tensors[name] for name in drawn.tensors} | changed)


@pytest.fixture(scope="module")
def base() -> Base:
    return base_of(random_weights(rank_unet=3, rank_vae=2))


@pytest.fixture(scope="module")
def saved(tiny: TurboWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the exporter writes of ``tiny``; the parity sets show that it is the published format."""
    path = tmp_path_factory.mktemp("saved") / "model.pkl"
    export_published(tiny, path)
    loaded = torch.load(path, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


def copied(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors in dictionaries that may be changed."""
    return {k: type(v)(v.items()) if isinstance(v, Mapping) else v for k, v in checkpoint.items()}


def refusal(checkpoint: Mapping[str, Any], base: Base) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_published(checkpoint, base, "model.pkl")
    text = str(caught.value)
    assert text.startswith("model.pkl: ") and "\n" not in text and "; " in text
    return text


def assert_same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(tensors) == list(expected)
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


# The published format, against the published program


def test_parity_layout_of_the_full_size_file(parity_set: Path) -> None:
    recorded = json.loads((parity_set / "keys_full.json").read_text(encoding="utf-8"))["model_pkl"]
    layout = Layout(
        unet_config=SD_TURBO_UNET,
        vae_config=SD_TURBO_VAE,
        rank_unet=recorded["rank_unet"],
        rank_vae=recorded["rank_vae"],
        vaes=ALL_VAES,
    )
    assert json.dumps(published_layout(layout)) == json.dumps(recorded)  # shapes, and order of all keys


def test_parity_import(parity_set: Path) -> None:
    base = parity_base(parity_set)
    original = torch.load(parity_set / "model.pkl", weights_only=True)
    imported = import_checkpoint(parity_set / "model.pkl", base)
    layout, tensors = imported.layout, imported.tensors
    assert imported.source == "diffusion-ffpe"
    assert (layout.rank_unet, layout.rank_vae) == (original["rank_unet"], original["rank_vae"])
    assert (imported.unet_scale, imported.vae_scale) == (1.0, 8.0 / original["rank_vae"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout.canonical()
    has_local = any(key.startswith("vae_patch.") for key in original["sd_vae_dec"])
    assert set(layout.vaes) == (set(ALL_VAES) if has_local else {"vae", "vae_b2a"})

    for leaf in ("weight", "bias"):
        assert torch.equal(tensors[f"unet.conv_in.{leaf}"], original["unet_conv_in"][f"base_layer.{leaf}"])
    for key in base.unet:
        if not key.startswith("conv_in."):
            assert torch.equal(tensors[f"unet.{key}"], base.unet[key])
    for entry in ("sd_encoder", "sd_decoder", "sd_other"):
        for key, tensor in original[entry].items():
            assert torch.equal(tensors[f"unet.{key}"], tensor)
    for key, tensor in original["sd_vae_dec"].items():
        name = key.replace(".base_layer", "").replace(".vae_skip", "")
        assert torch.equal(tensors[name], tensor)
    differs = any(
        not torch.equal(tensors[f"{vae}.{key}"], value)
        for vae in layout.vaes
        for key, value in base.vae.items()
    )
    assert differs == any("the file's VAE differs from base tiny-base" in n for n in imported.notices)


def test_parity_round_trip(parity_set: Path, tmp_path: Path) -> None:
    original = torch.load(parity_set / "model.pkl", weights_only=True)
    out = tmp_path / "out.pkl"
    export_published(weights_of(import_checkpoint(parity_set / "model.pkl", parity_base(parity_set))), out)
    written = torch.load(out, weights_only=True)
    assert list(written) == list(original)
    for entry, value in original.items():
        assert type(written[entry]) is type(value)
        if isinstance(value, Mapping):
            assert_same(written[entry], value)
        else:
            assert written[entry] == value
    assert out.stat().st_size <= (parity_set / "model.pkl").stat().st_size


# In


def test_what_is_exported_is_imported_again(tiny: TurboWeights, base: Base, saved: Mapping[str, Any]) -> None:
    imported = import_published(saved, base, "model.pkl")
    assert_same(imported.tensors, {name: tiny.tensors[name] for name in imported.layout.canonical()})
    assert (imported.unet_scale, imported.vae_scale) == (1.0, 4.0)
    assert imported.notices == ()


def test_a_file_without_local_encoders(base: Base, saved: Mapping[str, Any]) -> None:
    single = copied(saved)
    for entry in ("sd_vae_enc", "sd_vae_dec"):
        single[entry] = {key: value for key, value in saved[entry].items() if "_patch." not in key}
    imported = import_published(single, base, "model.pkl")
    assert imported.layout.vaes == ("vae", "vae_b2a")
    assert list(imported.tensors) == list(imported.layout.canonical())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_and_is_no_other_vae(
    base: Base, saved: Mapping[str, Any], dtype: torch.dtype
) -> None:
    half = {
        entry: {k: v.to(dtype) for k, v in value.items()} if isinstance(value, Mapping) else value
        for entry, value in saved.items()
    }
    imported = import_published(half, base, "model.pkl")
    assert {t.dtype for name, t in imported.tensors.items() if not name.startswith("unet.")} == {dtype}
    assert imported.tensors["unet.conv_in.weight"].dtype == dtype
    assert imported.tensors["unet.conv_out.weight"].dtype == torch.float32
    assert not [notice for notice in imported.notices if "VAE differs" in notice]


def test_both_spellings_of_peft(base: Base, saved: Mapping[str, Any]) -> None:
    named, plain = copied(saved), copied(saved)
    for entry in SECTIONS:
        plain[entry] = {
            re.sub(r"base_layer\.|(?<=lora_[AB]\.)\w+\.(?=weight)", "", k): v for k, v in saved[entry].items()
        }
        named[entry] = {
            re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", k): v for k, v in saved[entry].items()
        }
    assert "weight" in plain["unet_conv_in"] and "conv_in.lora_A.default.weight" in named["sd_encoder"]
    expected = import_published(saved, base, "model.pkl").tensors
    assert_same(import_published(plain, base, "model.pkl").tensors, expected)
    assert_same(import_published(named, base, "model.pkl").tensors, expected)


def test_the_dictionary_loaded_last_wins_with_a_notice(base: Base, saved: Mapping[str, Any]) -> None:
    other = copied(saved)
    key = "vae.encoder.conv_out.lora_B.vae_skip.weight"
    other["sd_vae_enc"][key] = saved["sd_vae_enc"][key] + 1
    other["unet_conv_in"]["lora_B.default_encoder.weight"] = saved["sd_encoder"]["conv_in.lora_B.weight"] + 1
    imported = import_published(other, base, "model.pkl")
    assert_same(imported.tensors, import_published(saved, base, "model.pkl").tensors)
    assert list(imported.notices) == [
        "unet_conv_in and sd_encoder differ in 1 of their tensors (unet.conv_in.lora_B.weight): "
        "sd_encoder is used",
        "sd_vae_enc and sd_vae_dec differ in 1 of their tensors (vae.encoder.conv_out.lora_B.weight): "
        "sd_vae_dec is used",
    ]


def test_another_vae_than_the_base_s_is_used_with_a_notice(base: Base, saved: Mapping[str, Any]) -> None:
    other = copied(saved)
    for entry in ("sd_vae_enc", "sd_vae_dec"):
        other[entry]["vae_b2a.quant_conv.bias"] = saved[entry]["vae_b2a.quant_conv.bias"] + 1
    imported = import_published(other, base, "model.pkl")
    assert torch.equal(imported.tensors["vae_b2a.quant_conv.bias"], base.vae["quant_conv.bias"] + 1)
    (notice,) = imported.notices
    assert "VAE differs from base tiny in 1 of 992 tensors (vae_b2a.quant_conv.bias)" in notice


def test_one_line_names_every_kind_of_difference(base: Base, saved: Mapping[str, Any]) -> None:
    wrong = copied(saved)
    for key in list(saved["sd_other"])[:5]:
        del wrong["sd_other"][key]
    wrong["sd_decoder"]["up_blocks.9.lora_A.weight"] = torch.zeros(1)
    wrong["sd_encoder"]["conv_in.lora_A.second.weight"] = torch.zeros(1)
    wrong["ema"] = {"conv_in.weight": torch.zeros(1)}
    for entry in ("sd_vae_enc", "sd_vae_dec"):
        wrong[entry]["vae.quant_conv.weight"] = torch.zeros(8, 7, 1, 1)
    wrong["unet_conv_in"]["base_layer.bias"] = "text"
    text = refusal(wrong, base)
    assert "does not fit base tiny: 5 missing (unet.mid_block" in text and ", …), 3 extra (ema, " in text
    assert "unet.up_blocks.9.lora_A.weight" in text and "sd_encoder conv_in.lora_A.second.weight" in text
    assert "1 of another shape (vae.quant_conv.weight [8,7,1,1] instead of [8,8,1,1])" in text
    assert "1 without floating-point values (unet.conv_in.bias)" in text
    assert "the base does not match: import it with the base it was trained on" in text


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_missing_and_extra_keys_are_counted(
    base: Base, saved: Mapping[str, Any], data: st.DataObject
) -> None:
    entry = data.draw(st.sampled_from([name for name in SECTIONS if name != "unet_conv_in"]))
    keys = st.sampled_from(list(saved[entry]))
    missing = data.draw(st.sets(keys, min_size=1, max_size=6))
    extra = data.draw(
        st.sets(st.text(max_size=5).map(lambda text: f"unknown.{text}"), min_size=1, max_size=6)
    )
    wrong = copied(saved)
    for key in missing:
        del wrong[entry][key]
    wrong[entry] |= dict.fromkeys(extra, torch.zeros(1))
    text = refusal(wrong, base)
    assert f" {len(missing)} missing (" in text and f" {len(extra)} extra (" in text


def test_a_base_of_another_width_is_named(saved: Mapping[str, Any]) -> None:
    wide = random_weights(unet_config={**TINY_UNET, "block_out_channels": (24, 24, 32, 32)})
    text = refusal(saved, base_of(wide, "wide"))
    assert "does not fit base wide" in text and "[16,4,3,3] instead of [24,4,3,3]" in text
    assert text.endswith("the base does not match: import it with the base it was trained on")


def test_a_rank_that_the_file_does_not_have(base: Base, saved: Mapping[str, Any]) -> None:
    assert "not of the rank that it states" in refusal({**saved, "rank_unet": 5}, base)
    for rank in (0, -1, True, "4", torch.tensor(4), None):
        assert "rank_vae is not a positive number" in refusal({**saved, "rank_vae": rank}, base)
    without = {key: value for key, value in saved.items() if key != "rank_unet"}
    assert "rank_unet is missing" in refusal(without, base)


def test_entries_that_are_missing_or_no_dictionary(base: Base, saved: Mapping[str, Any]) -> None:
    without = {key: value for key, value in saved.items() if key not in ("sd_other", "unet_conv_in")}
    assert "2 missing (unet_conv_in, sd_other)" in refusal(without, base)
    assert "sd_other is not a dictionary of tensors" in refusal({**saved, "sd_other": [1]}, base)


def test_entries_without_tensors_are_named_in_a_notice(base: Base, saved: Mapping[str, Any]) -> None:
    imported = import_published({**saved, "epoch": 3, "prompt\n": "x"}, base, "model.pkl")
    assert imported.notices == ("entries of the file that are not used: epoch, prompt\\n",)


@pytest.mark.parametrize(
    "broken",
    [{"vae_config": {**TINY_VAE, "block_out_channels": (8, 16)}}, {"unet": {}}],
    ids=["configuration", "weights"],
)
def test_a_broken_base_is_named(base: Base, saved: Mapping[str, Any], broken: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^tiny") as caught:
        import_published(saved, replace(base, **broken), "model.pkl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"state_dict": {}, "epoch": 1},
            "its keys are state_dict, epoch; name the file that holds the generator",
        ),
        ({}, "its keys are none"),
        ({"epoch": 1, "optimizer_gen": {}}, "name the model_<step>.pkl beside it"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, base: Base, content: dict[str, Any], said: str) -> None:
    path = tmp_path / "other.pkl"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(path, base)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and said in text
    assert "diffusion-ffpe, cyclegan-turbo and pix2pix-turbo" in text


# Out


@pytest.mark.parametrize(
    ("vaes", "lacking"),
    [(("vae", "vae_b2a"), "vae_patch, vae_b2a_patch"), (("vae", "vae_patch"), "vae_b2a, vae_b2a_patch")],
)
def test_export_needs_all_four_vaes(
    tmp_path: Path, tiny: TurboWeights, vaes: tuple[str, ...], lacking: str
) -> None:
    weights = replace(tiny, layout=replace(tiny.layout, vaes=vaes))
    with pytest.raises(CheckpointError, match=f"lack {lacking} of the four VAEs .*; export weights of both"):
        export_published(weights, tmp_path / "model.pkl")
    assert list(tmp_path.iterdir()) == []


def test_export_needs_adapters(tmp_path: Path, tiny: TurboWeights) -> None:
    weights = replace(tiny, layout=replace(tiny.layout, rank_vae=0))
    with pytest.raises(CheckpointError, match="no adapters; export the weights before a merge"):
        export_published(weights, tmp_path / "model.pkl")


def test_tensors_in_two_entries_are_stored_once(tmp_path: Path, tiny: TurboWeights) -> None:
    path = tmp_path / "model.pkl"
    backing = torch.zeros(10**6)  # a view must not take all of this into the file
    view = backing[: tiny.tensors["vae.quant_conv.bias"].numel()]
    export_published(replace(tiny, tensors={**tiny.tensors, "vae.quant_conv.bias": view}), path)
    written = torch.load(path, weights_only=True, mmap=True)
    enc, dec = written["sd_vae_enc"], written["sd_vae_dec"]
    assert list(enc) != list(dec) and {k: t.data_ptr() for k, t in enc.items()} == {
        k: t.data_ptr() for k, t in dec.items()
    }
    stored = {t.data_ptr(): t.nbytes for entry in SECTIONS for t in written[entry].values()}
    assert path.stat().st_size < sum(stored.values()) + 400 * len(stored)


def test_other_scales_go_into_the_adapters(tmp_path: Path, tiny: TurboWeights, base: Base) -> None:
    scaled = replace(tiny, unet_scale=0.5, vae_scale=3.0)
    export_published(scaled, tmp_path / "model.pkl")
    again = weights_of(import_checkpoint(tmp_path / "model.pkl", base))
    for name in ("unet.conv_in.weight", "unet.conv_out.weight", "vae_patch.encoder.conv_in.weight"):
        assert torch.allclose(merged_tensor(again, name), merged_tensor(scaled, name), atol=1e-6)
        assert not torch.allclose(merged_tensor(again, name), merged_tensor(tiny, name), atol=1e-3)


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system takes no file of more than 1 MB, as if the disk were full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, tiny: TurboWeights, small_files: None) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(b"old")
    with pytest.raises(
        CheckpointError, match=r"^\S+model.pkl: cannot be written \(File too large\); it takes"
    ):
        export_published(tiny, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pkl"]
    assert path.read_bytes() == b"old"


def test_too_little_space_is_seen_before_writing(
    tmp_path: Path, tiny: TurboWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"only 1\.0 MB are free\); it takes [\d.]+ MB: make space"):
        export_published(tiny, tmp_path / "model.pkl")
    assert list(tmp_path.iterdir()) == []


def test_places_that_take_no_file(
    tmp_path: Path, tiny: TurboWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, said in ((tmp_path, "it is a folder"), (tmp_path / "no" / "m.pkl", "there is no folder")):
        with pytest.raises(CheckpointError, match=said):
            export_published(tiny, path)

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        export_published(tiny, tmp_path / "model.pkl")
    assert list(tmp_path.iterdir()) == []


# CycleGAN-turbo


@pytest.fixture(scope="module")
def cyclegan(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The published dictionary less what Diffusion-FFPE adds, plus the lists of CycleGAN-turbo."""
    shared = {
        entry: saved[entry] for entry in ("rank_unet", "rank_vae", "sd_encoder", "sd_decoder", "sd_other")
    }
    vaes = {
        entry: OrderedDict((k, v) for k, v in saved[entry].items() if "_patch." not in k)
        for entry in ("sd_vae_enc", "sd_vae_dec")
    }
    lists = (
        "l_target_modules_encoder",
        "l_target_modules_decoder",
        "l_modules_others",
        "vae_lora_target_modules",
    )
    return {**shared, **vaes, **dict.fromkeys(lists, ["conv_in"])}


def test_cyclegan_turbo(tmp_path: Path, tiny: TurboWeights, base: Base, cyclegan: Mapping[str, Any]) -> None:
    path = tmp_path / "day2night.pkl"
    torch.save(cyclegan, path)
    imported = import_checkpoint(path, base)
    assert (imported.source, imported.layout.vaes) == ("cyclegan-turbo", ("vae", "vae_b2a"))
    assert (imported.unet_scale, imported.vae_scale) == (1.0, 4.0)
    stock = {f"unet.conv_in.{leaf}": base.unet[f"conv_in.{leaf}"] for leaf in ("weight", "bias")}
    expected = {name: tiny.tensors[name] for name in imported.layout.canonical()} | stock
    assert_same(imported.tensors, expected)
    assert imported.notices == (
        "the format does not store the trained base of conv_in: that of tiny is used",
    )


def test_cyclegan_turbo_that_does_not_fit(tmp_path: Path, base: Base, cyclegan: Mapping[str, Any]) -> None:
    path = tmp_path / "day2night.pkl"
    decoder = {k: v for k, v in cyclegan["sd_decoder"].items() if not k.startswith("up_blocks.0.")}
    torch.save({**cyclegan, "sd_decoder": decoder}, path)
    with pytest.raises(
        CheckpointError, match=r"day2night.pkl: does not fit base tiny: \d+ missing \(unet.up"
    ):
        import_checkpoint(path, base)


# pix2pix-turbo

UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out"]
UNET_TARGETS += ["proj_in", "proj_out", "ff.net.2", "ff.net.0.proj"]
VAE_TARGETS = [*UNET_TARGETS[:8], "conv_in", "conv_out", *(f"skip_conv_{k}" for k in range(1, 5))]


@pytest.fixture(scope="module")
def pix2pix(tiny: TurboWeights) -> dict[str, Any]:
    """UNet and VAE adapters with the names that peft gives them; conv_in whole, without an adapter."""
    unet = {f"conv_in.{leaf}": tiny.tensors[f"unet.conv_in.{leaf}"] for leaf in ("weight", "bias")}
    vae = {}
    for name, tensor in tiny.tensors.items():
        part, _, key = name.partition(".")
        if part == "unet" and ".lora_" in key and not key.startswith("conv_in."):
            unet[key.replace(".weight", ".default.weight")] = tensor
        elif part == "vae" and ".lora_" in key:
            vae[key.replace(".weight", ".vae_skip.weight")] = tensor
        elif part == "vae" and "skip_conv" in key:
            vae[key.replace(".weight", ".base_layer.weight")] = tensor
    return {
        "unet_lora_target_modules": UNET_TARGETS,
        "vae_lora_target_modules": VAE_TARGETS,
        "rank_unet": 3,
        "rank_vae": 2,
        "state_dict_unet": unet,
        "state_dict_vae": vae,
    }


def test_pix2pix_turbo(tmp_path: Path, tiny: TurboWeights, base: Base, pix2pix: Mapping[str, Any]) -> None:
    path = tmp_path / "edge_to_image.pkl"
    torch.save(pix2pix, path)
    imported = import_checkpoint(path, base)
    assert (imported.source, imported.layout.vaes) == ("pix2pix-turbo", ("vae",))
    assert (imported.unet_scale, imported.vae_scale) == (8 / 3, 4.0)
    names = imported.layout.canonical()
    empty = {
        f"unet.conv_in.lora_{m}.weight": torch.zeros(names[f"unet.conv_in.lora_{m}.weight"]) for m in "AB"
    }
    assert_same(imported.tensors, {name: tiny.tensors[name] for name in names} | empty)
    assert imported.notices == ()


def test_pix2pix_turbo_with_fewer_adapters(base: Base, pix2pix: Mapping[str, Any], tmp_path: Path) -> None:
    fewer = copied(pix2pix)
    fewer["unet_lora_target_modules"] = [name for name in UNET_TARGETS if name != "conv1"]
    fewer["state_dict_unet"] = {k: v for k, v in pix2pix["state_dict_unet"].items() if ".conv1." not in k}
    torch.save(fewer, tmp_path / "fewer.pkl")
    tensors = import_checkpoint(tmp_path / "fewer.pkl", base).tensors
    assert not tensors["unet.mid_block.resnets.0.conv1.lora_B.weight"].any()
    assert tensors["unet.mid_block.resnets.0.conv2.lora_B.weight"].any()
    fewer["unet_lora_target_modules"] = UNET_TARGETS  # now the file lacks what it lists
    torch.save(fewer, tmp_path / "lacking.pkl")
    with pytest.raises(CheckpointError, match=r"lacking.pkl: does not fit base tiny: 44 missing \(unet.down"):
        import_checkpoint(tmp_path / "lacking.pkl", base)


@pytest.mark.parametrize(
    ("entry", "change", "said"),
    [
        ("state_dict_unet", {"conv_in.conv_in_pretrained.weight": torch.zeros(1)}, "a twin conv_in"),
        ("state_dict_unet", {"time_embedding.linear_1.lora_A.default.weight": torch.zeros(1)}, "1 extra"),
        ("state_dict_vae", {"decoder.skip_conv_1.base_layer.weight": torch.zeros(1)}, "1 of another shape"),
        ("unet_lora_target_modules", "all-linear", "unet_lora_target_modules is no list of module names"),
        ("state_dict_vae", None, "1 missing (state_dict_vae)"),
    ],
)
def test_pix2pix_turbo_that_does_not_fit(
    tmp_path: Path, base: Base, pix2pix: Mapping[str, Any], entry: str, change: Any, said: str
) -> None:
    path = tmp_path / "sketch.pkl"
    value = {**pix2pix[entry], **change} if isinstance(change, dict) else change
    torch.save({**pix2pix, entry: value}, path)
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(path, base)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and said in text and "\n" not in text
