"""Paths: constants, consistency of marginals and jumps, and what they do to a Gaussian pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.translators import conditions, losses, parts, paths, representations, sampler, settings

pytestmark = pytest.mark.usefixtures("one_thread")

RHO = 0.7


def bridge(**given: object) -> paths.BridgePath:
    return paths.BridgePath(settings.PathConfig(**given))


def vp(**given: object) -> paths.VPPath:
    return paths.VPPath(settings.PathConfig(kind="vp", **given))


def coefficients(path: paths.Path, n: int | torch.Tensor) -> tuple[torch.Tensor, ...]:
    """a, b, s at n: what a pair of unit images and unit noise become."""
    count = n.numel() if isinstance(n, torch.Tensor) else 1
    one, none = torch.ones(count, 1, dtype=torch.float64), torch.zeros(count, 1, dtype=torch.float64)
    units = ((one, none, none), (none, one, none), (none, none, one))
    return tuple(path.sample(n, *unit).reshape(-1) for unit in units)


@pytest.mark.parametrize(
    ("beta_max", "total", "end", "middle", "at_step"),
    [
        (0.3, 0.1410272508, 0.3755359514, 0.1878919, 499),
        (1.0, 0.2469286989, 0.4969192076, 0.2486768, None),
    ],
)
def test_constants_of_the_bridge(
    beta_max: float, total: float, end: float, middle: float, at_step: int | None
) -> None:
    path = bridge(beta_max=beta_max, parity=True)
    assert float(path.forward[-1]) == pytest.approx(total, abs=1e-9)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(path.to_x0(999, torch.zeros_like(one), -one)) == pytest.approx(end, abs=1e-9)
    a, b, s = coefficients(path, torch.arange(path.steps))
    assert float(s.max()) == pytest.approx(middle, abs=1e-7)
    if at_step is not None:
        assert int(s.argmax()) == at_step
        assert float(a[999]) == pytest.approx(7.0858e-4, abs=1e-8)
    torch.testing.assert_close(a + b, torch.ones_like(a), atol=1e-12, rtol=0)


def test_an_exact_bridge_begins_at_the_source_and_ends_at_the_estimate() -> None:
    path = bridge()
    a, b, s = coefficients(path, 999)
    assert (float(a), float(b), float(s)) == (0.0, 1.0, 0.0)
    x, x0_hat = torch.ones(1, 3), torch.full((1, 3), 0.3)
    assert torch.equal(path.stepper((400, -1))(0, x, x0_hat, None, None), x0_hat)
    assert path.draws(0) and not path.draws(-1) and not bridge(parity=True).draws(0)
    kept = bridge(parity=True).stepper((400, 0))(0, x, x0_hat, None, None)
    assert 1e-4 < float((kept - x0_hat).max()) < 1e-2


@pytest.mark.parametrize(("parity", "limit"), [(True, 4e-7), (False, 1e-14)])
def test_a_jump_of_the_bridge_leads_to_the_marginal(parity: bool, limit: float) -> None:
    path = bridge(parity=parity)
    jump = path.stepper((700, 300))
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    of_x0, of_x, of_z = (
        float(jump(0, *given, None)) for given in ((none, one, none), (one, none, none), (none, none, one))
    )
    (a, b, s), wanted = coefficients(path, 700), coefficients(path, 300)
    found = (of_x0 + of_x * a, of_x * b, torch.sqrt((of_x * s) ** 2 + of_z**2))
    assert max(abs(float(x - y)) for x, y in zip(found, wanted, strict=True)) <= limit


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_jump_of_diffusion_leads_to_the_marginal(variance: str) -> None:
    path = vp(variance=variance)
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    units = ((none, one, none), (one, none, none), (none, none, one))
    for method, grid in (("ancestral", (700, 300, 0, -1)), ("ddim", (700, 300, 0, -1))):
        jump = path.stepper(grid, method)
        of_x0, of_x, of_z = (float(jump(0, *given, None)) for given in units)
        (a, _, s), (a_m, _, s_m) = coefficients(path, 700), coefficients(path, 300)
        assert of_x0 + of_x * float(a) == pytest.approx(float(a_m), abs=1e-12)
        if method == "ddim":
            assert of_z == 0 and of_x * float(s) == pytest.approx(float(s_m), abs=1e-12)
        elif variance == "fixed_small":
            assert (of_x * float(s)) ** 2 + of_z**2 == pytest.approx(float(s_m) ** 2, abs=1e-12)
        else:
            assert of_z**2 == pytest.approx(1 - float(a / a_m) ** 2, abs=1e-12)


def test_grids() -> None:
    parity, exact, diffusion = bridge(parity=True), bridge(), vp()
    assert parity.grid(2) == (999, 500, 0) and exact.grid(2) == (999, 500, -1)
    assert parity.grid(10)[::-1] == (0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999)
    assert exact.grid(1) == diffusion.grid(1) == diffusion.grid(1, "ddim") == (999, -1)
    assert diffusion.grid(4) == (999, 666, 333, 0, -1)
    assert diffusion.grid(4, "ddim") == (750, 500, 250, 0, -1)
    assert diffusion.grid(4, "dpmsolver") == (999, 749, 500, 250, -1)
    for path in (parity, exact, diffusion):
        grid = path.grid(999)
        assert len(grid) == 1000 and list(grid) == sorted(set(grid), reverse=True)


def test_too_many_steps_are_refused() -> None:
    for refused in (
        lambda: bridge().grid(1000),
        lambda: vp().grid(1001),
        lambda: vp().grid(1000, "dpmsolver"),
        lambda: vp().grid(400, "ddim"),
    ):
        with pytest.raises(ConfigError, match=r"sampling\.nfe"):
            refused()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_target_stands_for_the_image(prediction: str, schedule: str) -> None:
    path = vp(prediction=prediction, schedule=schedule)
    x0, z = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    n = torch.tensor([0, 10, 500, 990])
    x_n = path.sample(n, x0, None, z)
    torch.testing.assert_close(path.to_x0(n, x_n, path.target(n, x_n, x0, z)), x0, atol=1e-9, rtol=0)
    path = bridge()
    x_n = path.sample(n, x0, z, z)
    torch.testing.assert_close(path.to_x0(n, x_n, path.target(n, x_n, x0, z)), x0, atol=1e-12, rtol=0)


def test_ddim_and_ancestral_jumps_are_those_of_diffusers() -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    draw = torch.Generator().manual_seed(2)
    x, x0_hat = torch.randn(2, 2, 3, 4, 4, generator=draw)
    settings_of = {"beta_end": 0.02, "beta_start": 1e-4, "prediction_type": "sample", "clip_sample": False}
    grid, path = (999, 666, 333, 0, -1), vp(variance="fixed_large")
    ddpm = DDPMScheduler(1000, variance_type="fixed_large", **settings_of)
    ddpm.set_timesteps(timesteps=list(grid[:-1]))
    ancestral = path.stepper(grid)
    for k in range(3):
        wanted = ddpm.step(x0_hat, grid[k], x, generator=torch.Generator().manual_seed(k)).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        torch.testing.assert_close(ancestral(k, x, x0_hat, z, None), wanted, atol=2e-5, rtol=0)
    ddim = DDIMScheduler(1000, **settings_of)
    ddim.set_timesteps(4)
    grid = path.grid(4, "ddim")
    assert ddim.timesteps.tolist() == list(grid[:-1])
    for k in range(3):
        wanted = ddim.step(x0_hat, grid[k], x).prev_sample
        found = path.stepper(grid, "ddim")(k, x, x0_hat, None, None)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


# A Gaussian pair of unit variances and correlation RHO. All of a run is linear, so in place of many draws one
# "image" holds its coefficients with respect to x1 (pixel 0) and to the noise of each jump (pixels 1 ..): the
# sum of squares is the variance of the output, pixel 0 its covariance with x1, without Monte Carlo error.


def gaussian_run(path: paths.BridgePath, nfe: int, *, cond: bool) -> tuple[float, float]:
    """Variance of the output and its covariance with the source, for a perfect network."""
    a, b, s = coefficients(path, torch.arange(path.steps))
    times = path.time_input(torch.arange(path.steps))

    def net(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        n = int((times - t[0]).abs().argmin())
        if cond:
            x_n, x1 = x.chunk(2, 1)
            left = 1 - RHO**2
            spread = a[n] ** 2 * left + s[n] ** 2
            gain = a[n] * left / spread if spread > 1e-30 else 0.0
            x0_hat = RHO * x1 + gain * (x_n - b[n] * x1 - a[n] * RHO * x1)
        else:
            x_n = x
            gain = (a[n] + b[n] * RHO) / (a[n] ** 2 + b[n] ** 2 + 2 * RHO * a[n] * b[n] + s[n] ** 2)
            x0_hat = gain * x_n
        return path.target(n, x_n, x0_hat, None)

    made = parts.Parts(
        path=path,
        representation=representations.make_representation(settings.RepresentationConfig()),
        condition=conditions.Condition(settings.ConditionConfig(concat=cond)),
    )
    unit = torch.eye(nfe + 1, dtype=torch.float64)[:, None, None, None, :]
    sampling = settings.SamplingConfig(nfe=nfe, clip=False)
    x = sampler.draw(net, made, sampling, source=unit[0], noise=lambda k: unit[k])
    return float((x**2).sum()), float(x[0, 0, 0, 0])


def test_an_unconditioned_bridge_keeps_the_marginal_and_not_the_pairing() -> None:
    variance, covariance = gaussian_run(bridge(), 999, cond=False)
    assert variance == pytest.approx(1.0, abs=0.02) and covariance == pytest.approx(0.93, abs=0.02)


@pytest.mark.parametrize(("nfe", "wanted"), [(999, 1.0), (100, 0.98), (10, 0.85), (1, 0.49)])
def test_a_conditioned_bridge_converges_to_the_joint_distribution(nfe: int, wanted: float) -> None:
    variance, covariance = gaussian_run(bridge(), nfe, cond=True)
    assert variance == pytest.approx(wanted, abs=0.02) and covariance == pytest.approx(RHO, abs=0.02)


@pytest.mark.parametrize("nfe", [1, 10, 999])
def test_a_conditioned_bridge_without_noise_is_a_regression(nfe: int) -> None:
    variance, covariance = gaussian_run(bridge(ode=True), nfe, cond=True)
    assert variance == pytest.approx(RHO**2, abs=1e-6) and covariance == pytest.approx(RHO, abs=1e-6)
    with pytest.raises(ConfigError, match="path.ode"):
        settings.DiffusionConfig(
            path=settings.PathConfig(ode=True), condition=settings.ConditionConfig(concat=True)
        )


@pytest.mark.parametrize(
    ("beta_max", "wanted"), [(0.01, 0.96), (0.3, 0.93), (1.0, 0.87), (10.0, 0.58), (100.0, 0.12)]
)
def test_more_noise_loosens_the_tie_to_the_source(beta_max: float, wanted: float) -> None:
    _, covariance = gaussian_run(bridge(beta_max=beta_max), 999, cond=False)
    assert covariance == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("method", "nfe", "limit"), [("ancestral", 999, 0.01), ("ddim", 100, 0.03), ("dpmsolver", 50, 0.005)]
)
def test_diffusion_draws_the_right_spread(method: str, nfe: int, limit: float) -> None:
    path, spread = vp(prediction="sample"), 0.5
    a, _, s = coefficients(path, torch.arange(path.steps))

    def net(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        n = int(t[0])
        return x * a[n] * spread**2 / (a[n] ** 2 * spread**2 + s[n] ** 2)

    made = parts.make_parts(settings.DiffusionConfig(path=path.config))
    unit = torch.eye(nfe + 1, dtype=torch.float64)[:, None, None, None, :]
    sampling = settings.SamplingConfig(nfe=nfe, method=method, clip=False)
    x = sampler.draw(net, made, sampling, noise=lambda k: unit[k])
    assert float((x**2).sum().sqrt()) == pytest.approx(spread, rel=limit)


def test_p2_weights_of_the_three_predictions() -> None:
    n, weight = torch.arange(1000), settings.WeightConfig(kind="p2")
    abar = vp().abar
    wanted = {"epsilon": 1 - abar, "sample": abar, "v_prediction": abar * (1 - abar)}
    for prediction, table in wanted.items():
        found = losses.step_weights(vp(prediction=prediction), weight, n)
        torch.testing.assert_close(found, table, atol=1e-12, rtol=0)
    found = losses.step_weights(vp(), weight, n)
    assert float(found.mean()) == pytest.approx(0.7245, abs=1e-4)
    half = losses.step_weights(vp(), dataclasses.replace(weight, gamma=0.5), n)
    assert float(half.mean()) == pytest.approx(0.8059, abs=1e-4)
    with pytest.raises(ConfigError, match="p2"):
        losses.step_weights(bridge(), weight, n)


def test_the_three_predictions_have_one_loss() -> None:
    """The same estimate of the image costs the same, whatever the network returns."""
    draw = torch.Generator().manual_seed(3)
    x0, z, error = torch.randn(3, 4, 3, 8, 8, generator=draw, dtype=torch.float64)
    n, found = torch.tensor([5, 200, 500, 900]), []
    for prediction in ("epsilon", "sample", "v_prediction"):
        made = parts.make_parts(settings.DiffusionConfig(path=vp(prediction=prediction).config))
        x0_hat = x0 + 0.1 * error

        def net(
            x: torch.Tensor,
            t: torch.Tensor,
            label: torch.Tensor | None,
            made: parts.Parts = made,
            x0_hat: torch.Tensor = x0_hat,
        ) -> torch.Tensor:
            a, s = (paths.at(table.sqrt(), n, x) for table in (made.path.abar, 1 - made.path.abar))
            return made.path.target(n, x, x0_hat, (x - a * x0_hat) / s)

        weight = settings.WeightConfig(kind="p2")
        loss, _ = losses.path_loss(net, made, weight, x0=x0, source=None, label=None, n=n, z=z)
        found.append(float(loss))
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


def test_signal_to_noise_ratio() -> None:
    for path in (vp(), bridge(parity=True)):
        n = torch.arange(path.steps)
        a, _, s = coefficients(path, n)
        torch.testing.assert_close(path.snr(n), (a / s) ** 2, rtol=1e-9, atol=0)
    assert float(bridge().snr(999)) == 0.0 and bool(torch.isinf(bridge(ode=True).snr(torch.arange(3))).all())


@pytest.mark.parametrize("make", [bridge, vp])
def test_float32_images_stay_float32(make: Callable[[], paths.Path]) -> None:
    path, x = make(), torch.zeros(2, 3, 4, 4)
    n = torch.tensor([0, 999])
    assert path.sample(n, x, x, x).dtype == torch.float32
    assert path.stepper((999, 500))(0, x, x, x, None).dtype == torch.float32
    assert path.time_input(n).dtype == path.time_input(7).dtype == torch.float32


def test_a_bridge_needs_a_source_and_diffusion_noise() -> None:
    with pytest.raises(ConfigError, match="source image"):
        bridge().start(None, torch.zeros(1))
    with pytest.raises(ConfigError, match="noise"):
        vp().start(torch.zeros(1), None)
