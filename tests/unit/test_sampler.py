"""Sampling: conditions and guidance, independence of a batch, which noise is asked for, known pixels."""

from __future__ import annotations

import pytest
import torch

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators import losses, parts, sampler
from wsi_pipeline.translators.conditions import Condition
from wsi_pipeline.translators.settings import (
    ConditionConfig,
    DiffusionConfig,
    PathConfig,
    RepresentationConfig,
    SamplingConfig,
    WeightConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3
HAAR = RepresentationConfig(kind="haar")


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    """Something that depends on all it gets, sample by sample."""
    assert label is None or label.dtype == torch.int64
    code = torch.zeros(len(x)) if label is None else torch.tensor([0.1, -0.2, 0.5, 0.9])[label]
    own, *beside = x.chunk(2, 1) if x.shape[1] in (6, 24) else (x,)  # with a source image, or without
    own = own + 0.3 * sum(beside)
    return torch.tanh(own + (t / 1000 + code).reshape(-1, 1, 1, 1))


def noise(k: int) -> torch.Tensor:
    return normals(3, 3, 8, 8, seed=100 + k)


def make(
    kind: str = "vp",
    *,
    drop: float = 0.1,
    classes: int = CLASSES,
    concat: bool = False,
    haar: bool = False,
    ode: bool = False,
) -> parts.Parts:
    return parts.make_parts(
        DiffusionConfig(
            path=PathConfig(kind=kind, prediction="sample", ode=ode),
            representation=HAAR if haar else RepresentationConfig(),
            condition=ConditionConfig(classes=classes, drop=drop, concat=concat),
        )
    )


LABEL = torch.tensor([0, 1, 2])
SOURCE = normals(3, 3, 8, 8, seed=7).clamp(-1, 1)


@pytest.mark.parametrize("kind", ["vp", "bridge"])
def test_guidance_of_one_is_the_condition_and_more_goes_beyond(kind: str) -> None:
    made = make(kind)
    runs = {
        g: sampler.draw(net, made, SamplingConfig(nfe=4, guidance=g), source=SOURCE, label=LABEL, noise=noise)
        for g in (0.0, 1.0, 1.0 + 1e-4, 3.0)
    }
    plain = sampler.draw(
        net, make(kind, drop=0.0), SamplingConfig(nfe=4), source=SOURCE, label=LABEL, noise=noise
    )
    assert torch.equal(runs[1.0], plain)
    torch.testing.assert_close(runs[1.0 + 1e-4], plain, atol=1e-3, rtol=0)
    assert float((runs[3.0] - plain).abs().max()) > 0.01
    unlabelled = sampler.draw(net, made, SamplingConfig(nfe=4), source=SOURCE, noise=noise)
    torch.testing.assert_close(runs[0.0], unlabelled)


def test_guidance_extrapolates_estimates_of_the_image() -> None:
    made, x = make(), noise(0)
    free, given, guided = (
        sampler.estimate(net, made, 500, x, None, label, g)[0]
        for label, g in ((torch.full((3,), CLASSES), 1.0), (LABEL, 1.0), (LABEL, 2.5))
    )
    torch.testing.assert_close(guided, free + 2.5 * (given - free))


def test_guidance_needs_a_translator_that_knows_no_condition() -> None:
    with pytest.raises(ConfigError, match="condition.drop"):
        sampler.draw(net, make(drop=0.0), SamplingConfig(guidance=2.0), label=LABEL, noise=noise)
    with pytest.raises(ConfigError, match="condition.drop"):
        sampler.draw(net, make(drop=0.0), SamplingConfig(), noise=noise)


@pytest.mark.parametrize("method", ["ancestral", "ddim", "dpmsolver"])
@pytest.mark.parametrize("haar", [False, True])
def test_samples_of_a_batch_do_not_meet(method: str, haar: bool) -> None:
    made = make(concat=True, haar=haar)
    sampling = SamplingConfig(nfe=4, method=method, guidance=1.5)
    together = sampler.draw(net, made, sampling, source=SOURCE, label=LABEL, noise=noise)
    for i in range(3):
        one = slice(i, i + 1)
        alone = sampler.draw(
            net, made, sampling, source=SOURCE[one], label=LABEL[one], noise=lambda k, one=one: noise(k)[one]
        )
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "ode", "method", "masked", "wanted"),
    [
        ("vp", False, "ancestral", False, [0, 1, 2, 3]),
        ("vp", False, "ddim", False, [0]),
        ("vp", False, "dpmsolver", False, [0]),
        ("bridge", False, "ancestral", False, [1, 2, 3]),
        ("bridge", True, "ancestral", False, []),
        ("vp", False, "ancestral", True, [0, 1, 5, 2, 6, 3, 7]),
        ("vp", False, "ddim", True, [0, 5, 6, 7]),
        ("bridge", False, "ancestral", True, [0, 1, 5, 2, 6, 3, 7]),
        ("bridge", True, "ancestral", True, [0]),
    ],
)
def test_which_noise_is_asked_for(kind: str, ode: bool, method: str, masked: bool, wanted: list[int]) -> None:
    asked: list[int] = []

    def draws(k: int) -> torch.Tensor:
        asked.append(k)
        return noise(k)

    mask = torch.zeros(3, 1, 8, 8)
    mask[:, :, 2:6, 4:] = 1.0
    made = make(kind, ode=ode, haar=True)
    seen: list[tuple[int, int, float]] = []
    x = sampler.draw(
        net,
        made,
        SamplingConfig(nfe=4, method=method),
        source=None if masked or kind == "vp" else SOURCE,
        label=LABEL,
        noise=draws,
        known=(mask, SOURCE) if masked else None,
        watch=lambda k, m, x_m, x0_hat: seen.append((k, m, float(x0_hat.abs().max()))),
    )
    assert asked == wanted
    assert [(k, m) for k, m, _ in seen] == list(enumerate(made.path.grid(4, method)[1:]))
    assert all(peak <= 1 + 1e-5 for _, _, peak in seen) and x.shape == SOURCE.shape
    if masked:
        outside = mask.expand_as(x) == 0
        torch.testing.assert_close(x[outside], SOURCE[outside], atol=1e-6, rtol=0)
        assert float((x - SOURCE)[~outside].abs().max()) > 0.01


def test_known_pixels_have_the_noise_of_their_step() -> None:
    seen: list[torch.Tensor] = []
    mask = torch.zeros(3, 1, 8, 8)
    sampler.draw(
        net,
        make(classes=0, drop=0.0),
        SamplingConfig(nfe=4),
        noise=noise,
        known=(mask, SOURCE),
        watch=lambda k, m, x_m, x0_hat: seen.append(x_m),
    )
    path = make().path
    torch.testing.assert_close(seen[1], path.sample(path.grid(4)[2], SOURCE, None, noise(6)))
    assert torch.equal(seen[-1], SOURCE)


def test_the_range_of_values_holds() -> None:
    for haar in (False, True):
        x = sampler.draw(
            lambda x, t, label: 9 * torch.ones_like(x),
            make(haar=haar),
            SamplingConfig(nfe=2),
            label=LABEL,
            noise=noise,
            value_range=(0.0, 0.25),
        )
        assert float(x.max()) <= 0.25 + 1e-6 and float(x.min()) >= -1e-6
    x = sampler.draw(
        lambda x, t, label: 9 * torch.ones_like(x),
        make(),
        SamplingConfig(nfe=2, clip=False),
        label=LABEL,
        noise=noise,
    )
    assert float(x.max()) == pytest.approx(9.0)


def test_sampling_leaves_no_graph_and_the_source_alone() -> None:
    source, weight = SOURCE.clone(), torch.ones((), requires_grad=True)
    x = sampler.draw(
        lambda x, t, label: weight * x,
        make("bridge", classes=0, drop=0.0),
        SamplingConfig(nfe=3),
        source=source,
        noise=noise,
    )
    assert not x.requires_grad and torch.equal(source, SOURCE)


def test_dropped_conditions_are_zeros_and_the_class_behind_the_last() -> None:
    condition = Condition(ConditionConfig(classes=CLASSES, concat=True, drop=0.5))
    source, label = condition.drop(SOURCE, LABEL, torch.tensor([False, True, False]))
    assert source is not None and label is not None
    assert label.tolist() == [0, CLASSES, 2] and float(source[1].abs().max()) == 0
    assert torch.equal(source[::2], SOURCE[::2])
    source, label = condition.null(SOURCE, LABEL)
    assert source is not None and label is not None
    assert label.tolist() == [CLASSES] * 3 and float(source.abs().max()) == 0
    assert condition.null(None, None) == (None, None)
    with pytest.raises(ConfigError, match="condition.concat"):
        condition.join(SOURCE, None)


def test_dropping_hides_the_condition_but_not_the_start_of_a_bridge() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def spy(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        seen.append((x, label))
        return x[:, :3]

    made, n = make("bridge", concat=True), torch.tensor([999, 999, 999])
    batch = {"x0": noise(0), "source": SOURCE, "label": LABEL, "n": n, "z": noise(1)}
    for drop in (None, torch.tensor([True, False, True])):
        losses.path_loss(spy, made, WeightConfig(), **batch, drop_B=drop)
    (all_x, all_label), (x, label) = seen
    assert torch.equal(all_x[:, :3], SOURCE) and torch.equal(all_x[:, 3:], SOURCE)
    assert torch.equal(x[:, :3], SOURCE) and torch.equal(x[1, 3:], SOURCE[1])
    assert float(x[::2, 3:].abs().max()) == 0
    assert all_label is not None and all_label.tolist() == [0, 1, 2]
    assert label is not None and label.tolist() == [CLASSES, 1, CLASSES]


def test_several_source_images_are_encoded_one_by_one() -> None:
    made = parts.make_parts(
        DiffusionConfig(representation=HAAR, condition=ConditionConfig(concat=True, sources=2))
    )
    x1, source_h = made.encode_source(torch.cat([SOURCE, -SOURCE], 1))
    assert x1 is not None and source_h is not None
    h = made.representation.encode(SOURCE)
    assert torch.equal(x1, h) and torch.equal(source_h, torch.cat([h, -h], 1))
    with pytest.raises(ConfigError, match="condition.sources"):
        made.encode_source(SOURCE)


def test_channels_of_the_network() -> None:
    assert make().network_channels() == (3, 3)
    assert make(concat=True, haar=True).network_channels() == (24, 12)
    learned = parts.make_parts(DiffusionConfig(path=PathConfig(kind="vp", variance="learned_range")))
    assert learned.network_channels() == (3, 6)
    published = DiffusionConfig(
        path=PathConfig(kind="vp", prediction="sample", variance="fixed_large"),
        representation=RepresentationConfig(kind="haar", axes=("z", "y", "x"), ll_scale=3.0),
        condition=ConditionConfig(concat=True, sources=3),
    )
    assert parts.make_parts(published).network_channels(1) == (32, 8)


def test_learned_variances_widen_the_jumps() -> None:
    """The second half of the output is the place of the log variance between its bounds."""
    made = parts.make_parts(DiffusionConfig(path=PathConfig(kind="vp", variance="learned_range")))
    step = made.path.stepper((999, 500, -1))
    x, x0_hat, z = noise(0), noise(1), noise(2)
    low, high = (
        (step(0, x, x0_hat, z, torch.full_like(x, v)) - step(0, x, x0_hat, 0 * z, torch.full_like(x, v))) / z
        for v in (-1.0, 1.0)
    )
    abar = made.path.snr(torch.tensor([500, 999])) / (1 + made.path.snr(torch.tensor([500, 999])))
    beta = 1 - abar[1] / abar[0]
    assert float(high.mean()) == pytest.approx(float(beta.sqrt()), rel=1e-3)
    small = beta * (1 - abar[0]) / (1 - abar[1])
    assert float(low.mean()) == pytest.approx(float(small.sqrt()), rel=1e-3)


def test_a_short_training_run_learns_the_pairs() -> None:
    """All paths and representations, one linear network: the loss falls, and sampling leads to the target."""
    x0 = torch.tanh(normals(4, 1, 8, 8, seed=1))
    source = 0.5 * x0
    for kind, haar in (("bridge", False), ("bridge", True), ("vp", True)):
        made = parts.make_parts(
            DiffusionConfig(
                path=PathConfig(kind=kind, prediction="sample"),
                representation=HAAR if haar else RepresentationConfig(),
                condition=ConditionConfig(concat=True),
            )
        )
        channels, out = made.network_channels(1)
        mix = torch.zeros(out, channels, requires_grad=True)

        def ask(
            x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None, mix: torch.Tensor = mix
        ) -> torch.Tensor:
            return torch.einsum("oc,bchw->bohw", mix, x)

        optimiser, kept = torch.optim.Adam([mix], lr=0.05), []
        for i in range(150):
            n = torch.randint(0, 1000, (4,), generator=torch.Generator().manual_seed(i))
            z = normals(4, 1, 8, 8, seed=i)
            loss, _ = losses.path_loss(ask, made, WeightConfig(), x0=x0, source=source, label=None, n=n, z=z)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            kept.append(loss.item())
        assert sum(kept[-20:]) < 0.5 * sum(kept[:20]), (kind, haar)
        found = sampler.draw(
            ask, made, SamplingConfig(nfe=10), source=source, noise=lambda k: normals(4, 1, 8, 8, seed=k)
        )
        assert float((found - x0).abs().mean()) < float((source - x0).abs().mean()), (kind, haar)
