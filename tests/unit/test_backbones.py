"""Frozen backbones: taps, files, what is refused, and that only images get gradients."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.models.backbones import Backbone, BackboneConfig, build_backbone, make_backbone
from wsi_pipeline.models.vit_towers import tap_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = "test_vit"  # timm's own miniature: 6 blocks, width 64, made for 160 px


def images(side: int = 96, count: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, side, side + 32, generator=rng) * 2 - 1


@pytest.fixture(scope="module")
def vit() -> Any:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(VIT, pretrained=False, dynamic_img_size=True).eval()
    with torch.no_grad():
        model.pos_embed.normal_()
    return model


@pytest.fixture(scope="module")
def vit_file(vit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Miniatures of open_clip, known to it by name while these tests run."""
    import open_clip
    from open_clip import factory

    folder = tmp_path_factory.mktemp("clip")
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    own = {"image_size": 32, "layers": 12, "width": 64, "head_width": 32, "patch_size": 8}
    of_timm = {"image_size": 160, "timm_model_name": VIT, "timm_pool": "token", "timm_proj": "linear"}
    before = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    for name, vision in (("mini-own", own), ("mini-timm", of_timm)):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)

    def saved(name: str) -> Path:
        torch.manual_seed(0)
        path = folder / f"{name}.bin"
        torch.save({"state_dict": open_clip.create_model(name).state_dict()}, path)
        return path

    yield saved
    factory._MODEL_CONFIGS, factory._MODEL_CONFIG_PATHS = before


def hooked(model: Any, blocks: Any, x: Tensor) -> list[Tensor]:
    """What every block puts out."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, y: found.append(y)) for block in blocks]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


# tiny


def test_tiny_is_the_same_everywhere_and_draws_nothing() -> None:
    torch.manual_seed(1)
    first = make_backbone("tiny")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    second = make_backbone("tiny")
    assert all(torch.equal(a, b) for a, b in zip(first(images()), second(images()), strict=True))
    # The filters themselves: another generator would make other networks of old checkpoints.
    total = sum(float(kernel.double().abs().sum()) for kernel in first.network.filters)
    assert total == pytest.approx(1926.72611, rel=1e-7)


def test_tiny_levels() -> None:
    backbone = make_backbone("tiny")
    map0, map1, vector = backbone(images())
    width = backbone.widths[0]
    assert backbone.widths == (width, width, width)
    assert map0.shape == map1.shape == (2, width, 8, 8)
    torch.testing.assert_close(vector, map1.mean(dim=(2, 3)))
    patch = make_backbone("tiny", level2="first_patch")(images())[2]
    assert torch.equal(patch, map1[:, :, 0, 0])
    larger = make_backbone("tiny", input=128)(images())
    assert larger[0].shape == (2, width, 16, 16)


def test_tiny_sees_colour_and_texture() -> None:
    backbone = make_backbone("tiny")
    grey = torch.zeros(1, 3, 64, 64)
    pink = grey + torch.tensor([0.4, -0.2, 0.2])[None, :, None, None]
    noise = grey + 0.4 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    base = backbone(grey)[2]
    assert (backbone(pink)[2] - base).norm() > 0.1 * base.norm()
    assert (backbone(noise)[2] - base).norm() > 0.1 * base.norm()


# Any backbone


def test_preparation_averages_and_normalises() -> None:
    backbone = make_backbone("tiny")
    x = images(128)[:, :, :, :128]
    blocks = x.reshape(2, 3, 64, 2, 64, 2).mean(dim=(3, 5)) * 0.5 + 0.5
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    torch.testing.assert_close(backbone.prepare(x), (blocks - mean) / std)


def test_a_backbone_is_frozen_but_lets_gradients_through() -> None:
    backbone = make_backbone("tiny").train()
    assert not any(module.training for module in backbone.modules())
    x = images().requires_grad_()
    sum(level.square().sum() for level in backbone(x)).backward()
    assert x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_half_precision_weights_give_float32_features() -> None:
    full, half = make_backbone("tiny"), make_backbone("tiny", dtype="bfloat16")
    assert {parameter.dtype for parameter in half.network.parameters()} == {torch.bfloat16}
    for a, b in zip(full(images()), half(images()), strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (4, 8, 11)), (24, (9, 17, 23)), (6, (1, 3, 5)), (2, (0, 0, 1)), (1, (0, 0, 0))]
)
def test_taps_of_other_depths(depth: int, blocks: tuple[int, int, int]) -> None:
    assert tap_blocks(depth) == blocks


def test_config_is_strict_and_describes_itself() -> None:
    adapter = TypeAdapter(BackboneConfig)
    config = adapter.validate_python({"kind": "tiny", "level2": "first_patch"})
    assert dataclasses.asdict(config) == adapter.dump_python(config)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "tinny"})
    assert isinstance(build_backbone(config), Backbone)
    assert BackboneConfig().level2 == "cls"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "resnet"}, "backbone.kind: there is no 'resnet'; choose from conch, timm, open_clip, tiny"),
        ({"kind": "tiny", "level2": "last"}, "backbone.level2: there is no 'last'"),
        ({"kind": "tiny", "dtype": "float16"}, "backbone.dtype: there is no 'float16'"),
        ({"kind": "tiny", "input": 16}, "backbone.input: 16 px is too small"),
        ({"kind": "tiny", "model": "vit"}, "backbone.model: kind tiny takes no model name"),
        ({"kind": "tiny", "weights": "x.bin"}, "backbone.weights: kind tiny takes no weights"),
        ({"kind": "timm"}, "backbone.model: kind timm needs a model name"),
        ({"kind": "open_clip"}, "backbone.model: kind open_clip needs a model name"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("'", ".")):
        build_backbone(BackboneConfig(**options))


# timm


def test_timm_taps_are_raw_outputs_of_blocks(vit: Any, vit_file: Path) -> None:
    with_token = make_backbone("timm", model=VIT, weights=vit_file, input=128)
    with_patch = make_backbone("timm", model=VIT, weights=vit_file, input=128, level2="first_patch")
    x = images()
    # timm resamples position embeddings in each pass here.
    outputs = hooked(vit, vit.blocks, with_token.prepare(x))
    map0, map1, vector = with_token(x)
    for found, block in ((map0, 1), (map1, 3)):
        wanted = outputs[block][:, 1:].transpose(1, 2).reshape(2, 64, 8, 8)
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(vector, outputs[5][:, 0])
    torch.testing.assert_close(with_patch(x)[2], outputs[5][:, 1])
    assert with_token.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_wrappings_of_a_file_do_not_matter(vit: Any, vit_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = vit.state_dict()
    prefixed = {f"module.{name}": value for name, value in plain.items()}
    torch.save(prefixed, tmp_path / "a.pth")
    torch.save({"epoch": 3, "state_dict": prefixed}, tmp_path / "b.pth")
    save_file(plain, tmp_path / "c.safetensors")
    wanted = make_backbone("timm", model=VIT, weights=vit_file)(images())
    for name in ("a.pth", "b.pth", "c.safetensors"):
        found = make_backbone("timm", model=VIT, weights=tmp_path / name)(images())
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), name


def test_layer_scale_and_registers_are_read_from_the_file(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_vit4", pretrained=False, img_size=64).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(0.7)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    backbone = make_backbone(
        "timm", model="test_vit4", weights=tmp_path / "vit.pth", input=64, level2="first_patch"
    )
    x = images()
    outputs = hooked(model, model.blocks, backbone.prepare(x))
    torch.testing.assert_close(backbone(x)[2], outputs[-1][:, 1])
    with pytest.raises(ConfigError, match="no class token; choose first_patch"):
        make_backbone("timm", model="test_vit4", weights=tmp_path / "vit.pth", input=64)


def test_layer_scale_that_a_model_has_by_its_file_alone(tmp_path: Path) -> None:
    import timm

    model = timm.create_model(VIT, pretrained=False, img_size=64, init_values=0.3).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    backbone = make_backbone("timm", model=VIT, weights=tmp_path / "vit.pth", input=64)
    outputs = hooked(model, model.blocks, backbone.prepare(images()))
    torch.testing.assert_close(backbone(images())[2], outputs[-1][:, 0])


def test_a_file_of_another_network_is_refused(vit: Any, tmp_path: Path) -> None:
    state = vit.state_dict()
    del state["blocks.2.norm1.weight"]
    state["blocks.9.norm1.weight"] = torch.ones(64)
    state["cls_token"] = torch.zeros(1, 1, 32)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError) as caught:
        make_backbone("timm", model=VIT, weights=tmp_path / "vit.pth")
    for said in (
        "vit.pth",
        "1 missing (blocks.2.norm1.weight)",
        "1 extra (blocks.9",
        "1 of another shape (cls",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "no_such_vit"])
def test_models_of_timm_that_are_no_vit(name: str, vit_file: Path) -> None:
    with pytest.raises(ConfigError, match=f"backbone.model: .*{name}"):
        make_backbone("timm", model=name, weights=vit_file)


# Missing and hostile files


@pytest.mark.parametrize(("kind", "model"), [("conch", None), ("timm", VIT), ("open_clip", "ViT-B-32")])
def test_nothing_is_downloaded(kind: Any, model: str | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        make_backbone(kind, model=model)
    with pytest.raises(CheckpointError, match="weights.bin: is not there") as caught:
        make_backbone(kind, model=model, weights=tmp_path / "weights.bin")
    assert "\n" not in str(caught.value)


def test_missing_conch_weights_say_where_they_are_and_their_licence() -> None:
    with pytest.raises(CheckpointError) as caught:
        make_backbone("conch")
    for said in ("huggingface.co/MahmoodLab/CONCH", "pytorch_model.bin", "CC-BY-NC-ND 4.0"):
        assert said in str(caught.value)


def test_another_file_is_no_conch(vit_file: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit CONCH's visual trunk: of 150, 72 missing"):
        make_backbone("conch", weights=vit_file)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "pytorch_model.bin", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"visual.trunk.cls_token": Bomb(touched)}))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        make_backbone("conch", weights=path)
    assert not touched.exists()


# open_clip


def test_open_clip_taps_its_own_transformer(clip: Callable[[str], Path]) -> None:
    import open_clip

    path = clip("mini-own")
    torch.manual_seed(0)
    visual = open_clip.create_model("mini-own").visual.eval()
    # At its own size, 32 px, would be a 4 x 4 grid: too small an input, so it is resampled to 64.
    backbone = make_backbone("open_clip", model="mini-own", weights=path, input=64)
    visual.positional_embedding = nn.Parameter(resampled(visual.positional_embedding, 4, 8))
    outputs = hooked(visual, visual.transformer.resblocks, backbone.prepare(images()))
    map0, map1, vector = backbone(images())
    for found, block in ((map0, 4), (map1, 8)):
        torch.testing.assert_close(found, outputs[block][:, 1:].transpose(1, 2).reshape(2, 64, 8, 8))
    torch.testing.assert_close(vector, outputs[11][:, 0])
    patch = make_backbone("open_clip", model="mini-own", weights=path, input=64, level2="first_patch")
    torch.testing.assert_close(patch(images())[2], outputs[11][:, 1])


def resampled(table: Tensor, old: int, new: int) -> Tensor:
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat([table[:1], grid.reshape(-1, new * new).T]).detach()


def test_open_clip_towers_of_timm(clip: Callable[[str], Path]) -> None:
    import open_clip

    path = clip("mini-timm")
    torch.manual_seed(0)
    trunk = open_clip.create_model("mini-timm").visual.trunk.eval()
    backbone = make_backbone("open_clip", model="mini-timm", weights=path, input=160)
    outputs = hooked(trunk, trunk.blocks, backbone.prepare(images()))
    torch.testing.assert_close(backbone(images())[2], outputs[5][:, 0])


def test_open_clip_models_that_are_no_vit(vit_file: Path) -> None:
    with pytest.raises(ConfigError, match="no vision transformer"):
        make_backbone("open_clip", model="RN50", weights=vit_file)
    with pytest.raises(ConfigError, match="open_clip has no"):
        make_backbone("open_clip", model="ViT-Z", weights=vit_file)


def test_features_do_not_depend_on_the_batch() -> None:
    backbone = make_backbone("tiny")
    together, alone = backbone(images(count=3)), backbone(images(count=3)[1:2])
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1:2].numpy(), b.numpy(), atol=1e-5)
