"""LPIPS on random weights: what a distance is, gradients on flat images, where its weights come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wsi_pipeline.errors import CheckpointError
from wsi_pipeline.models import lpips
from wsi_pipeline.models.lpips import VGG16_FILE, VGG16_URL, Lpips, make_lpips
from wsi_pipeline.models.tensor_file import read_header

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = Path(lpips.__file__).with_name("lpips_vgg_v01.safetensors")


def torchvision_features() -> nn.Sequential:
    """VGG16's features as torchvision lists them, random."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        features = vgg16().features
    features.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return features.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    return torchvision_features()


@pytest.fixture(scope="module")
def vgg_file(features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "checkpoints" / VGG16_FILE
    path.parent.mkdir()
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def distance(vgg_file: Path) -> Lpips:
    return make_lpips(vgg_file)


def images(count: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_terms_written_out(features: nn.Sequential, distance: Lpips) -> None:
    x, y = images(), images().flip(3)
    mean = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    std = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    a, b, wanted = (x - mean) / std, (y - mean) / std, []
    for place, layer in enumerate(features):
        a, b = layer(a), layer(b)
        if place in (3, 8, 15, 22, 29):
            weight = distance.heads[len(wanted)].flatten()
            unit = [level / level.norm(dim=1, keepdim=True) for level in (a, b)]
            wanted.append(((unit[0] - unit[1]) ** 2).mean(dim=(2, 3)) @ weight)
    torch.testing.assert_close(distance.per_layer(x, y), torch.stack(wanted))
    torch.testing.assert_close(distance(x, y), torch.stack(wanted).sum(dim=0))


def test_a_distance(distance: Lpips) -> None:
    x, y = images(), images().roll(5, 2)
    assert torch.equal(distance(x, x), torch.zeros(2))
    torch.testing.assert_close(distance(x, y), distance(y, x))
    near, far = distance(x, 0.9 * x + 0.1 * y), distance(x, y)
    assert (near > 0).all() and (near < far).all()


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0])
def test_gradients_on_flat_images_are_finite(distance: Lpips, level: float) -> None:
    x = torch.full((1, 3, 32, 32), level, requires_grad=True)
    distance(x, images(1, 32, 32)).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_gradients_are_finite_where_every_channel_is_zero(
    distance: Lpips, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without biases, an image of the mean colour leaves zeros in every tap, where a root has no derivative.
    bare = {f"features.{name}": value.clone() for name, value in distance.features.state_dict().items()}
    for name in bare:
        if name.endswith("bias"):
            bare[name].zero_()
    heads = {f"lin{i}.model.1.weight": weight for i, weight in enumerate(distance.heads)}
    flat = Lpips(bare, heads)
    x = flat.mean.expand(1, 3, 32, 32).clone().requires_grad_()
    found = flat(x, images(1, 32, 32))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(x.grad).all()
    # A ReLU hides what is not finite from the image, so the normalised taps are asked themselves.
    monkeypatch.setattr(flat.features, "forward", lambda x: [x * 0.0])
    zero = torch.ones(1, 3, 4, 4, requires_grad=True)
    flat._taps(zero)[0].sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_frozen_and_whole_in_its_module(distance: Lpips) -> None:
    assert not distance.training
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert {tensor.device.type for tensor in distance.to("cpu").state_dict().values()} == {"cpu"}


def test_heads_in_the_package_carry_their_licence() -> None:
    header = read_header(HEADS, "")
    assert header.metadata["licence"] == "BSD-2-Clause"
    for said in ("Richard Zhang", "Redistributions of source code", "THIS SOFTWARE IS PROVIDED"):
        assert said in header.metadata["notice"]
    assert header.size_bytes < 10_000


def test_heads_are_not_negative(distance: Lpips) -> None:
    assert all((weight >= 0).all() for weight in distance.heads)


def test_weights_are_found_in_torchs_cache(
    vgg_file: Path, distance: Lpips, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "torch"
    (home / "hub" / "checkpoints").mkdir(parents=True)
    (home / "hub" / "checkpoints" / VGG16_FILE).symlink_to(vgg_file)
    monkeypatch.setenv("TORCH_HOME", str(home))
    x, y = images(), images().flip(2)
    assert torch.equal(make_lpips()(x, y), distance(x, y))


def test_without_weights_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        make_lpips()
    for said in (VGG16_FILE, VGG16_URL, "objective.adversarial.lpips=false"):
        assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="mine.pth: is not there"):
        make_lpips(tmp_path / "mine.pth")


def test_other_files_are_refused_by_name(vgg_file: Path, tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: is not VGG16.*25 tensors differ"):
        make_lpips(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: holds no heads of LPIPS.*5 tensors differ"):
        make_lpips(vgg_file, tmp_path / "other.pth")
