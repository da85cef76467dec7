"""Weights of other programs as translators: what they become, what is refused, and that nothing is run."""

from __future__ import annotations

import json
import math
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline import cli
from wsi_pipeline.errors import CheckpointError, ConfigError
from wsi_pipeline.model_api import import_foreign, show_model
from wsi_pipeline.models.network_config import NetworkConfig
from wsi_pipeline.models.networks import build_network
from wsi_pipeline.translators.bundle import build_translator, load_translator
from wsi_pipeline.translators.importers import (
    AdmOptions,
    BridgeOptions,
    Imported,
    Pix2PixOptions,
    import_translator,
)

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]


def imported(state: Any, kind: Any, folder: Path, options: Any = None) -> Imported:
    (folder / "weights.pt").unlink(missing_ok=True)  # tensors of an earlier one are mapped from its file
    torch.save(state, folder / "weights.pt")
    return import_translator(folder / "weights.pt", kind=kind, options=options)


def refusal(state: Any, kind: Any, folder: Path, options: Any = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        imported(state, kind, folder, options)
    said = str(caught.value)
    assert said.startswith(f"{folder / 'weights.pt'}: ") and "\n" not in said
    return said


class Adm:
    """ADM's U-Net from its formulae (Dhariwal and Nichol, 2021), with the names of guided-diffusion.

    Two levels of one block, 32 and 64 channels, attention on the coarser one; ``heads`` of each.
    """

    def __init__(self, heads: int = 2, classes: int = 0, taken: int = 3, given: int = 6) -> None:
        self.heads, self.random, self.state = heads, torch.Generator().manual_seed(11), State()
        self.linear_("time_embed.0", 32, 128)
        self.linear_("time_embed.2", 128, 128)
        if classes:
            self.state["label_emb.weight"] = torch.randn(classes, 128, generator=self.random)
        self.conv_("input_blocks.0.0", taken, 32)
        for name, channels, out in (("1.0", 32, 32), ("2.0", 32, 32), ("3.0", 32, 64)):
            self.block_(f"input_blocks.{name}", channels, out)
        self.attention_("input_blocks.3.1", 64)
        self.block_("middle_block.0", 64, 64)
        self.attention_("middle_block.1", 64)
        self.block_("middle_block.2", 64, 64)
        for name, channels, out in (("0.0", 128, 64), ("1.0", 96, 64), ("1.2", 64, 64), ("2.0", 96, 32)):
            self.block_(f"output_blocks.{name}", channels, out)
        self.block_("output_blocks.3.0", 64, 32)
        for name in ("0.1", "1.1"):
            self.attention_(f"output_blocks.{name}", 64)
        self.norm_("out.0", 32)
        self.conv_("out.2", 32, given)

    def linear_(self, name: str, taken: int, given: int, *kernel: int) -> None:
        size = (given, taken, *kernel)
        weight = torch.randn(size, generator=self.random) / math.sqrt(math.prod(size[1:]))
        self.state |= {f"{name}.weight": weight, f"{name}.bias": weight.flatten(1)[:, 0] * 0.3}

    def conv_(self, name: str, taken: int, given: int, side: int = 3) -> None:
        self.linear_(name, taken, given, side, side)

    def norm_(self, name: str, channels: int) -> None:
        scale, shift = 1 + 0.2 * torch.randn(2, channels, generator=self.random)
        self.state |= {f"{name}.weight": scale, f"{name}.bias": shift - 1}

    def block_(self, name: str, taken: int, given: int) -> None:
        self.norm_(f"{name}.in_layers.0", taken)
        self.conv_(f"{name}.in_layers.2", taken, given)
        self.linear_(f"{name}.emb_layers.1", 128, 2 * given)
        self.norm_(f"{name}.out_layers.0", given)
        self.conv_(f"{name}.out_layers.3", given, given)
        if taken != given:
            self.conv_(f"{name}.skip_connection", taken, given, 1)

    def attention_(self, name: str, channels: int) -> None:
        self.norm_(f"{name}.norm", channels)
        self.linear_(f"{name}.qkv", channels, 3 * channels, 1)
        self.linear_(f"{name}.proj_out", channels, channels, 1)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, name: str, h: Tensor) -> Tensor:
        weight, bias = self.of(name)
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, *self.of(name), eps=1e-5)

    def block(self, name: str, h: Tensor, emb: Tensor, sides: str = "same") -> Tensor:
        inner = F.silu(self.norm(f"{name}.in_layers.0", h))
        if sides == "half":
            inner, h = F.avg_pool2d(inner, 2), F.avg_pool2d(h, 2)
        elif sides == "double":
            inner, h = (v.repeat_interleave(2, -1).repeat_interleave(2, -2) for v in (inner, h))
        inner = self.conv(f"{name}.in_layers.2", inner)
        step = F.linear(F.silu(emb), *self.of(f"{name}.emb_layers.1"))[:, :, None, None]
        scale, shift = step.chunk(2, dim=1)
        inner = self.norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        inner = self.conv(f"{name}.out_layers.3", F.silu(inner))
        return inner + (
            self.conv(f"{name}.skip_connection", h) if f"{name}.skip_connection.bias" in self.state else h
        )

    def attention(self, name: str, h: Tensor) -> Tensor:
        rows = F.conv1d(self.norm(f"{name}.norm", h).flatten(2), *self.of(f"{name}.qkv"))
        made = []
        for head in rows.chunk(self.heads, dim=1):  # each holds its own q, k and v, one after the other
            q, k, v = head.chunk(3, dim=1)
            weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1]), dim=-1)
            made.append(torch.einsum("bts,bcs->bct", weight, v))
        return h + F.conv1d(torch.cat(made, dim=1), *self.of(f"{name}.proj_out")).view(h.shape)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        angles = t[:, None] * torch.tensor([10_000.0 ** (-k / 16) for k in range(16)])
        emb = F.linear(torch.cat([angles.cos(), angles.sin()], dim=1), *self.of("time_embed.0"))
        emb = F.linear(F.silu(emb), *self.of("time_embed.2"))
        if label is not None:
            emb = emb + self.state["label_emb.weight"][label]
        h0 = self.conv("input_blocks.0.0", x)
        h1 = self.block("input_blocks.1.0", h0, emb)
        h2 = self.block("input_blocks.2.0", h1, emb, "half")
        h3 = self.attention("input_blocks.3.1", self.block("input_blocks.3.0", h2, emb))
        h = self.attention("middle_block.1", self.block("middle_block.0", h3, emb))
        h = self.block("middle_block.2", h, emb)
        h = self.attention("output_blocks.0.1", self.block("output_blocks.0.0", torch.cat([h, h3], 1), emb))
        h = self.attention("output_blocks.1.1", self.block("output_blocks.1.0", torch.cat([h, h2], 1), emb))
        h = self.block("output_blocks.1.2", h, emb, "double")
        h = self.block("output_blocks.2.0", torch.cat([h, h1], 1), emb)
        h = self.block("output_blocks.3.0", torch.cat([h, h0], 1), emb)
        return self.conv("out.2", F.silu(self.norm("out.0", h)))


def inputs(channels: int = 3) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(5))
    return drawn, torch.tensor([0.3, 812.0])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_an_adm_network_gives_what_its_formulae_give(heads: int, tmp_path: Path) -> None:
    adm, (x, t), label = Adm(heads, classes=3), inputs(), torch.tensor([2, 0])
    found = imported(adm.state, "adm", tmp_path, AdmOptions(heads=heads, classes=("a", "b", "c")))
    network = build_translator(found.spec, found.tensors)
    with torch.no_grad():
        assert (network(x, t, label) - adm(x, t, label)).abs().max() < 1e-5
        # The class that stands for "no label" has no embedding of its own.
        assert (network(x, t) - adm(x, t)).abs().max() < 1e-5
        by_width = imported(adm.state, "adm", tmp_path, AdmOptions(head_width=64 // heads))
        same = build_translator(by_width.spec, by_width.tensors)(x, t)
        assert (same - adm(x, t)).abs().max() < 1e-5
        if heads > 1:
            wrong = imported(adm.state, "adm", tmp_path, AdmOptions(heads=1))
            assert (build_translator(wrong.spec, wrong.tensors)(x, t) - adm(x, t)).abs().max() > 0.01


def test_an_adm_file_says_its_path_and_what_nobody_can_read_from_it(tmp_path: Path) -> None:
    found = imported(Adm(classes=3).state, "adm", tmp_path, AdmOptions(heads=2, schedule="cosine"))
    assert found.spec.diffusion is not None
    path, condition = found.spec.diffusion.path, found.spec.diffusion.condition
    assert (path.kind, path.schedule, path.variance, path.prediction) == (
        "vp",
        "cosine",
        "learned_range",
        "epsilon",
    )
    assert condition.classes == 3 and not found.spec.translates
    assert any("2 heads" in notice for notice in found.notices)
    assert any("no label" in notice for notice in found.notices)
    plain = imported(Adm(given=3).state, "adm", tmp_path).spec
    assert plain.diffusion is not None and plain.diffusion.path.variance == "fixed_large"


def latest(adm: Adm, **changes: Any) -> dict[str, Any]:
    """What I2SB saves; averages are the weights times 1.1."""
    net = {f"diffusion_model.{key}": tensor for key, tensor in adm.state.items()}
    averages = {"decay": 0.99, "num_updates": 7, "shadow_params": [1.1 * t for t in net.values()]}
    averages["collected_params"] = None  # type: ignore[assignment]
    return {"net": net, "ema": averages, "optimizer": {"state": {}, "param_groups": [{"lr": 5e-5}]}} | changes


@pytest.mark.parametrize("cond_x1", [False, True])
def test_a_bridge_is_imported_with_its_averages(cond_x1: bool, tmp_path: Path) -> None:
    adm = Adm(taken=6 if cond_x1 else 3, given=3)
    options = BridgeOptions(heads=2, beta_max=1.0, cond_x1=cond_x1)
    found = imported(latest(adm, sched={"last_epoch": 3}), "i2sb", tmp_path, options)
    raw = imported({"net": latest(adm)["net"]}, "i2sb", tmp_path, options)
    assert torch.equal(raw.tensors["conv_in.bias"], adm.state["input_blocks.0.0.bias"])
    adm.state = {key: 1.1 * tensor for key, tensor in adm.state.items()}
    x, t = inputs(6 if cond_x1 else 3)
    with torch.no_grad():
        made, wanted = build_translator(found.spec, found.tensors)(x, t), adm(x, t)
    assert (made - wanted).abs().max() < 1e-5 * wanted.abs().max()
    diffusion = found.spec.diffusion
    assert diffusion is not None and diffusion.path.beta_max == 1.0 and diffusion.path.parity
    assert diffusion.condition.concat == cond_x1 and found.spec.translates
    assert "no commercial use" in found.spec.licence


def test_options_of_a_bridge_that_do_not_fit_are_told(tmp_path: Path) -> None:
    three, six = (latest(Adm(taken=taken, given=3)) for taken in (3, 6))
    assert "cond_x1=true" in refusal(six, "i2sb", tmp_path, BridgeOptions(heads=2))
    assert "cond_x1=false" in refusal(three, "i2sb", tmp_path, BridgeOptions(heads=2, cond_x1=True))
    with pytest.raises(ConfigError, match="ode"):
        imported(six, "i2sb", tmp_path, BridgeOptions(heads=2, cond_x1=True, ode=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda shadow: shadow[:-1],
        lambda shadow: [*shadow, torch.zeros(3)],
        lambda shadow: [shadow[1], shadow[0], *shadow[2:]],
        lambda shadow: [3.0, *shadow[1:]],
        lambda shadow: None,
    ],
)
def test_averages_have_to_be_those_of_the_network_in_its_order(damage: Any, tmp_path: Path) -> None:
    checkpoint = latest(Adm(given=3))
    checkpoint["ema"]["shadow_params"] = damage(checkpoint["ema"]["shadow_params"])
    assert "averages" in refusal(checkpoint, "i2sb", tmp_path, BridgeOptions(heads=2))


@pytest.mark.parametrize("cond_x1", [False, True])
def test_a_bridge_can_begin_with_weights_of_a_diffusion_model(cond_x1: bool, tmp_path: Path) -> None:
    adm, (x, t) = Adm(), inputs()
    found = imported(adm.state, "i2sb", tmp_path, BridgeOptions(heads=2, cond_x1=cond_x1))
    assert any("begin training" in notice for notice in found.notices)
    with torch.no_grad():
        source = torch.cat([x, torch.randn_like(x)], dim=1) if cond_x1 else x
        made = build_translator(found.spec, found.tensors)(source, t)
        assert (made - adm(x, t)[:, :3]).abs().max() < 1e-5


def without(state: State, part: str) -> State:
    return {key: tensor for key, tensor in state.items() if part not in key}


def test_files_that_are_something_else_are_refused_in_one_line(tmp_path: Path) -> None:
    adm = Adm().state
    two = AdmOptions(heads=2)
    assert "out_layers" in refusal(without(adm, "input_blocks.1.0"), "adm", tmp_path, two)
    assert "missing" in refusal(without(adm, "middle_block.2"), "adm", tmp_path, two)
    assert "1 too many (odd.weight)" in refusal(adm | {"odd.weight": torch.ones(2)}, "adm", tmp_path, two)
    shape = refusal(adm | {"out.0.bias": torch.ones(5)}, "adm", tmp_path, two)
    assert "another shape" in shape and "conv_norm_out.bias" in shape
    assert "unflatten" in refusal(adm, "adm", tmp_path, AdmOptions(heads=5))
    assert "more than tensors (optimizer)" in refusal(adm | {"optimizer": {}}, "adm", tmp_path, two)
    assert "kind adm" in refusal({"a": torch.ones(2)}, "adm", tmp_path)
    assert "kind i2sb" in refusal({"net": 3}, "i2sb", tmp_path)
    refusal(adm, "pix2pix", tmp_path)
    refusal(latest(Adm(given=3)), "adm", tmp_path, two)


def generator(family: Any, norm: Any, **settings: Any) -> nn.Module:
    config = NetworkConfig(family=family, norm=norm, **({"base": 2} | settings))
    torch.manual_seed(3)
    network = build_network(config, in_channels=3, out_channels=3).eval()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand_like(buffer) if "var" in name else torch.randn_like(buffer))
    return network


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(
    ("family", "settings", "tile"),
    [
        ("pix2pix", {"mult": (1, 2, 4, 8, 8, 8, 8)}, 256),
        ("pix2pix", {"mult": (1, 2, 4, 8, 8, 8, 8, 8)}, 256),
        ("pix2pix", {"mult": (1, 2, 4, 8, 8, 8, 8, 8, 8)}, 512),
        ("resnet", {"mult": (1, 2, 4), "blocks": 9}, 256),
        ("resnet", {"mult": (1, 2, 4), "blocks": 6, "dropout": 0.5}, 256),
    ],
)
def test_a_generator_of_pix2pix_is_known_by_its_tensors(
    family: Any, settings: Any, tile: int, norm: Any, tmp_path: Path
) -> None:
    network = generator(family, norm, **settings)
    parallel = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    found = imported(parallel, "pix2pix", tmp_path)
    known = found.spec.network
    assert (known.family, known.norm, known.base, known.mult) == (family, norm, 2, settings["mult"])
    assert known.blocks == settings.get("blocks", 1) and known.dropout == settings.get("dropout", 0.0)
    assert found.spec.tile == tile and found.spec.translates
    assert ("running statistics" if norm == "batch" else "colour") in found.notices[0]
    side = max(16, known.multiple)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loaded = build_translator(found.spec, found.tensors)
        assert torch.equal(loaded(x), network(x)) and not loaded.training
        free = imported(parallel, "pix2pix", tmp_path, Pix2PixOptions(tanh=False))
        assert torch.allclose(build_translator(free.spec, free.tensors)(x).tanh(), network(x), atol=1e-6)


def test_norms_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    levels = (1, 2, 4, 8, 8)
    batch, instance = (generator("pix2pix", norm, mult=levels).state_dict() for norm in ("batch", "instance"))
    statistics = {key: t for key, t in batch.items() if "running" in key}
    for state in (instance | statistics, without(batch, "running"), without(instance, ".bias")):
        assert "neither batch norms with statistics nor instance norms without" in refusal(
            state, "pix2pix", tmp_path
        )
    affine = {key: t for key, t in batch.items() if key.endswith(".2.weight")}
    assert "too many (model.model.1.model.2.weight" in refusal(instance | affine, "pix2pix", tmp_path)
    first = "model.model.1.model.1.weight"
    assert "another shape" in refusal(batch | {first: batch[first][:, :1]}, "pix2pix", tmp_path)
    gray = dict(batch)
    gray["model.model.0.weight"] = gray["model.model.0.weight"][:, :1]
    assert "model.model.3" in refusal(gray, "pix2pix", tmp_path)  # takes one channel and makes three


class Sentinel:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["adm", "i2sb", "pix2pix"])
def test_no_pickle_of_others_is_ever_run(kind: Any, zipped: bool, tmp_path: Path) -> None:
    trap, path = tmp_path / "ran", tmp_path / "weights.pt"
    for content in (latest(Adm(given=3), sched=Sentinel(trap)), Sentinel(trap)):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="code or objects") as caught:
            import_translator(path, kind=kind)
        assert "\n" not in str(caught.value) and not trap.exists()
    torch.load(path, weights_only=False)  # it would have been
    assert trap.exists()


def test_options_of_i2sb_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "ran"
    (tmp_path / "options.pkl").write_bytes(pickle.dumps(Sentinel(trap)))
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    imported(latest(Adm(given=3)), "i2sb", tmp_path, BridgeOptions(heads=2))
    assert not trap.exists()
    monkeypatch.undo()
    pickle.loads((tmp_path / "options.pkl").read_bytes())  # noqa: S301
    assert trap.exists()


def test_a_weights_file_of_it_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    network = generator("pix2pix", "batch", mult=(1, 2, 4, 8))
    torch.save(network.state_dict(), tmp_path / "latest_net_G.pth")
    out = tmp_path / "g.safetensors"
    made = import_foreign(tmp_path / "latest_net_G.pth", out, kind="pix2pix", mpp=0.25, tile=64)
    facts, tensors = load_translator(out)
    assert show_model(out) == facts == made.facts and made.notices
    assert (facts.spec.mpp, facts.spec.tile, facts.spec.source) == (0.25, 64, "pix2pix")
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(build_translator(facts.spec, tensors)(x), network(x))
    with pytest.raises(ConfigError, match="exists"):
        import_foreign(tmp_path / "latest_net_G.pth", out, kind="pix2pix")
    with pytest.raises(ConfigError, match="multiple of 16; give 16 or 32"):
        import_foreign(tmp_path / "latest_net_G.pth", tmp_path / "h.safetensors", kind="pix2pix", tile=20)


def test_the_command_line_imports_shows_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    adm, out = tmp_path / "adm.pt", tmp_path / "adm.safetensors"
    torch.save(Adm(classes=2).state, adm)

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wsi-pipeline", "models", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    begin = ("import", adm, "-o", out, "--kind", "adm")
    code, shown, notes = run(*begin, "--set", "heads=2", "--set", "classes=[IDH, wild]", "--tile", "32")
    assert code == 0 and "unet2d" in shown and "vp of 1000 steps" in shown and "IDH, wild" in shown
    assert "Next: wsi-pipeline sample" in shown and "2 heads" in notes
    code, shown, _ = run("show", out, "--log-format", "json")
    facts = json.loads(shown)
    assert facts["spec"]["network"]["heads"] == 2 and facts["spec"]["classes"] == ["IDH", "wild"]
    for words, said in (
        (("--set", "beta_max=1"), "beta_max: no such setting"),
        (("--set", "heads=many"), "heads"),
        (("--overwrite", "--tile", "33"), "--tile 33"),
        ((), "exists"),
    ):
        code, _, errors = run(*begin, *words)
        assert code == 2 and said in errors and len(errors.splitlines()) == 1
    code, _, errors = run("import", adm, "-o", out, "--set", "heads=2")
    assert code == 2 and "--kind" in errors
