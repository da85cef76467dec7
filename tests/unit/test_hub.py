"""The base model: any of its usual forms gives the same tensors; another model is refused in one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models import prompts
from wsi_pipeline.models.hub import FILES, OLD_ATTENTION, SD_TURBO, fetch_base, find_base, load_base
from wsi_pipeline.models.layout import Layout
from wsi_pipeline.models.prompts import PROMPTS, embed_prompts, token_ids
from wsi_pipeline.models.random_weights import TINY_UNET, TINY_VAE, RandomTensors
from wsi_pipeline.models.weights import tensors_digest

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
}
HUB_ID = "someone/some-turbo"


@pytest.fixture(scope="module")
def made_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model in diffusers' layout: UNet and VAE random, text encoder and tokenizer stubs."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    layout = Layout(unet_config=TINY_UNET, vae_config=TINY_VAE, rank_unet=0, rank_vae=0, vaes=())
    vae = {key: shape for key, shape in layout.vae_base.items() if ".skip_conv_" not in key}
    networks = {
        "unet": ("UNet2DConditionModel", TINY_UNET, layout.unet_base),
        "vae": ("AutoencoderKL", TINY_VAE, vae),
    }
    for name, (kind, config, shapes) in networks.items():
        (folder / name).mkdir(parents=True)
        document = {"_class_name": kind, "_name_or_path": "/somewhere", **config}
        (folder / name / "config.json").write_text(json.dumps(document))
        save_file(dict(RandomTensors(shapes)), folder / name / WEIGHTS)
    for name in FILES:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(SCHEDULER) if "scheduler" in name else "{}")
    return folder


@pytest.fixture
def base_folder(made_base: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made_base, tmp_path / "tiny"))


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "no remedy"
    return message


def test_a_base_is_what_its_files_hold(made_base: Path) -> None:
    base = load_base(made_base)
    unet, vae = load_file(made_base / "unet" / WEIGHTS), load_file(made_base / "vae" / WEIGHTS)
    assert base.name == "tiny"
    assert base.unet.keys() == unet.keys()
    assert base.vae.keys() == vae.keys()
    assert all(torch.equal(base.unet[key], tensor) for key, tensor in unet.items())
    assert all(torch.equal(base.vae[key], tensor) for key, tensor in vae.items())
    prefixed = {f"unet.{k}": t for k, t in unet.items()} | {f"vae.{k}": t for k, t in vae.items()}
    assert base.digest == tensors_digest(prefixed)
    assert not [key for key in (*base.unet_config, *base.vae_config) if key.startswith("_")]


def halved(base: Path) -> None:
    for part in ("unet", "vae"):
        path = base / part / WEIGHTS
        half = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
        path.unlink()


def sharded(base: Path) -> None:
    path = base / "unet" / WEIGHTS
    tensors = load_file(path)
    names = {
        key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)
    }
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, path.with_name(name))
    path.with_name(f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    path.unlink()


def pickled(base: Path) -> None:
    for part in ("unet", "vae"):
        path = base / part / WEIGHTS
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()


def with_old_names(base: Path) -> None:
    path = base / "vae" / WEIGHTS
    tensors = load_file(path)
    for old, new in OLD_ATTENTION.items():
        tensors = {
            key.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): t for key, t in tensors.items()
        }
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, path)


@pytest.mark.parametrize("form", [sharded, pickled, with_old_names])
def test_every_form_of_the_files_gives_the_same_base(
    made_base: Path, base_folder: Path, form: Callable[[Path], None]
) -> None:
    form(base_folder)
    assert load_base(base_folder).digest == load_base(made_base).digest


def test_half_precision_files_are_taken_where_there_is_nothing_better(
    made_base: Path, base_folder: Path
) -> None:
    whole = load_base(made_base)
    halved(base_folder)
    half = load_base(base_folder)
    assert half.digest != whole.digest
    assert {tensor.dtype for tensor in (*half.unet.values(), *half.vae.values())} == {torch.float16}
    assert all(torch.equal(half.vae[key], tensor.half()) for key, tensor in whole.vae.items())


def test_a_pickle_that_runs_code_is_refused(base_folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    pickled(base_folder)
    path = base_folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Evil()}, path)
    assert refusal(load_base, base_folder).startswith(f"{path}: ")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("num_train_timesteps", 50),
        ("beta_schedule", "linear"),
        ("beta_start", 0.0001),
        ("beta_end", 0.02),
        ("clip_sample", True),
        ("trained_betas", [0.1]),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_another_noise_schedule_is_refused(base_folder: Path, key: str, value: Any) -> None:
    path = base_folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SCHEDULER, key: value}))
    message = refusal(load_base, base_folder)
    assert message.startswith(f"{path}: ")
    assert f"{key} {value!r}" in message


def test_what_the_scheduler_leaves_unsaid(base_folder: Path) -> None:
    path = base_folder / "scheduler" / "scheduler_config.json"
    silent = {
        k: v for k, v in SCHEDULER.items() if k not in ("prediction_type", "clip_sample", "trained_betas")
    }
    path.write_text(json.dumps(silent))
    assert load_base(base_folder).name == "tiny"
    path.write_text("{}")  # no betas: they would be diffusers' defaults, which are others
    assert "beta_start None" in refusal(load_base, base_folder)


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.split("/")[0] in ("unet", "vae", "scheduler")]
)
def test_a_missing_file_is_named(base_folder: Path, name: str) -> None:
    (base_folder / name).unlink()
    message = refusal(load_base, base_folder)
    assert str((base_folder / name).parent) in message
    assert Path(name).name in message


def test_weights_that_do_not_fit_their_configuration(base_folder: Path) -> None:
    path = base_folder / "vae" / WEIGHTS
    tensors = load_file(path)
    for change, said in (
        ({"quant_conv.bias": torch.zeros(3)}, "another shape for 1 tensors (first quant_conv.bias)"),
        ({"other.weight": torch.zeros(3)}, "has besides 1 tensors (first other.weight)"),
        (None, "lacks 248 tensors"),
    ):
        save_file({**tensors, **change} if change else {"x": torch.zeros(1)}, path)
        message = refusal(load_base, base_folder)
        assert message.startswith(f"{base_folder / 'vae'}: ")
        assert said in message


def test_damaged_files_are_refused(base_folder: Path) -> None:
    path = base_folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    assert "truncated" in refusal(load_base, base_folder)
    config = base_folder / "unet" / "config.json"
    config.write_text("{")
    assert refusal(load_base, base_folder).startswith(f"{config}: is not JSON")
    config.write_text("[]")
    assert "holds no settings" in refusal(load_base, base_folder)
    config.write_text(json.dumps({"_class_name": "UNet3DConditionModel"}))
    assert "describes a UNet3DConditionModel" in refusal(load_base, base_folder)
    config.write_text(json.dumps({**TINY_UNET, "block_out_channels": [7]}))
    assert "cannot be built" in refusal(load_base, base_folder)


def test_an_index_stays_in_its_folder(base_folder: Path, tmp_path: Path) -> None:
    path = base_folder / "unet" / WEIGHTS
    index = path.with_name(f"{WEIGHTS}.index.json")
    path.rename(tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../outside.safetensors"}}))
    assert str(path.with_name("outside.safetensors")) in refusal(load_base, base_folder)
    index.write_text(json.dumps({"weights": 1}))
    assert refusal(load_base, base_folder).startswith(f"{index}: is no index")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def put_into(cache: Path, base: Path) -> Path:
    """The cache's own layout, as huggingface_hub leaves it."""
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(base, repository / "snapshots" / commit))


def test_a_hub_id_is_found_in_the_cache_offline(made_base: Path, cache: Path) -> None:
    snapshot = put_into(cache, made_base)
    assert find_base(HUB_ID) == snapshot
    base = load_base(HUB_ID)
    assert base.name == HUB_ID
    assert base.digest == load_base(made_base).digest
    assert fetch_base(HUB_ID) == snapshot


def test_a_base_that_is_nowhere(cache: Path, tmp_path: Path) -> None:
    message = refusal(load_base, HUB_ID)
    assert message.startswith(f"{HUB_ID}: ")
    assert f"models fetch {HUB_ID}" in message
    assert "--base" in message
    assert "no such folder" in refusal(load_base, str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(load_base, tmp_path / "file")


def test_fetching_takes_only_what_is_needed(made_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(made_base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_base() == made_base
    assert asked["hub_id"] == SD_TURBO
    assert asked.keys() == {"hub_id", "allow_patterns"}, "the normal cache"
    useless = [
        "sd_turbo.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "model_index.json",
    ]
    wanted = [*FILES, "unet/diffusion_pytorch_model-00001-of-00002.safetensors", f"unet/{WEIGHTS}.index.json"]
    taken = [name for name in useless + wanted if any(fnmatch(name, p) for p in asked["allow_patterns"])]
    assert taken == wanted


def test_a_repository_that_is_no_base(
    made_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vae").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    message = refusal(fetch_base, HUB_ID)
    assert "unet/config.json" in message
    assert "vae/*.safetensors" in message


def raised(kind: type[Exception], *arguments: Any) -> Exception:
    """An error of huggingface_hub without the server's answer that its constructor wants."""
    error = kind.__new__(kind)
    error.args = arguments
    return error


@pytest.mark.parametrize(
    ("error", "said", "by_hand"),
    [
        (raised(errors.LocalEntryNotFoundError, "no"), "huggingface.co cannot be reached", True),
        (raised(errors.OfflineModeIsEnabled, "no"), "huggingface.co cannot be reached", True),
        (raised(errors.GatedRepoError, "403"), "is gated; accept its terms", True),
        (raised(errors.RepositoryNotFoundError, "404"), "is not on the Hugging Face hub", False),
        (raised(errors.HfHubHTTPError, "500 Server Error"), "cannot be downloaded", True),
        (OSError(errno.ENOSPC, "No space left on device"), "no space for it", False),
        (ConnectionError("reset\nby peer"), "cannot be downloaded (reset)", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_failed_download_says_what_to_put_where(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, by_hand: bool
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refusal(fetch_base)
    assert message.startswith(f"{SD_TURBO}: ")
    assert said in message
    if by_hand:
        assert all(name in message for name in FILES)
        assert "--base sd-turbo" in message


def test_offline_is_told_from_unreachable(cache: Path) -> None:
    message = refusal(fetch_base, HUB_ID)
    assert "HF_HUB_OFFLINE is set" in message
    assert "--base some-turbo" in message
    assert "is no hub id" in refusal(fetch_base, "not a hub id")


def test_embeddings_are_those_of_the_fixtures(parity_set: Path) -> None:
    cases = np.load(parity_set / "generator_cases.npz")
    base = parity_set / "tiny-base"
    ids = token_ids(base, list(PROMPTS.values()))
    found = embed_prompts(base, list(PROMPTS.values()))
    for k, (direction, text) in enumerate(PROMPTS.items()):
        assert np.array_equal(ids[k].numpy(), cases[f"token_ids_{direction}"])
        embedding = found[k].embedding
        assert (found[k].text, embedding.dtype, embedding.shape[0]) == (text, torch.float32, 1)
        assert not embedding.requires_grad
        expected = cases[f"text_emb_{direction}"]
        assert np.abs(embedding.numpy() - expected).max() <= 1e-5
        alone = embed_prompts(base, [text])[0].embedding
        assert torch.allclose(alone, embedding, atol=1e-5)


def test_a_long_caption_is_cut(parity_set: Path) -> None:
    assert token_ids(parity_set / "tiny-base", ["section " * 200]).shape == (1, 77)


def test_another_padding_is_refused(parity_set: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parity_set / "tiny-base" / "tokenizer", tmp_path / "tokenizer"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        path.chmod(0o644)
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|endoftext|>"}))
    message = refusal(token_ids, tmp_path, ["frozen section"])
    assert message.startswith(f"{folder}: pads with id ")


DAMAGE = [
    ("tokenizer/vocab.json", "{"),
    ("tokenizer/vocab.json", '{"a": 1}'),
    ("tokenizer/vocab.json", None),
    ("tokenizer/merges.txt", "a b\n"),
    ("tokenizer/merges.txt", None),
    ("text_encoder/model.safetensors", "{"),
    ("text_encoder/model.safetensors", None),
    ("text_encoder/config.json", "[]"),
    ("text_encoder/config.json", '{"hidden_size": 31}'),
    ("text_encoder/config.json", '{"hidden_size": 64, "num_attention_heads": 4}'),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_text_part_is_refused(
    parity_set: Path, tmp_path: Path, name: str, content: str | None
) -> None:
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(parity_set / "tiny-base" / part, tmp_path / part)
        for path in (tmp_path / part, *(tmp_path / part).iterdir()):
            path.chmod(0o755)
    damaged = tmp_path / name
    damaged.unlink() if content is None else damaged.write_text(content)
    assert refusal(embed_prompts, tmp_path, ["frozen section"]).startswith(f"{damaged.parent}: ")
    shutil.rmtree(damaged.parent)
    assert "is missing" in refusal(embed_prompts, tmp_path, ["frozen section"])


def test_a_text_encoder_that_lacks_tensors_is_refused(parity_set: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parity_set / "tiny-base" / "text_encoder", tmp_path / "text_encoder"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if "final_layer_norm.weight" in key))
    for item in (folder, path):
        item.chmod(0o755)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        prompts._text_encoder(folder)


def test_a_half_precision_text_encoder_is_run_in_float32(parity_set: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(parity_set / "tiny-base", tmp_path / "base"))
    path = base / "text_encoder" / "model.safetensors"
    for item in (path.parent, path):
        item.chmod(0o755)
    half = {key: t.half() if t.is_floating_point() else t for key, t in load_file(path).items()}
    save_file(half, path.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    path.unlink()
    found = embed_prompts(base, ["frozen section"])[0].embedding
    assert found.dtype == torch.float32
    whole = embed_prompts(parity_set / "tiny-base", ["frozen section"])[0].embedding
    assert 0 < (found - whole).abs().max() < 0.05
