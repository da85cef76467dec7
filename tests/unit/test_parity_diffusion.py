"""Bridge, P2-weighted diffusion and wavelet diffusion against arrays of the published code.

The affine network of the fixtures stands where the U-Net would be.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import parity_other as other
import pytest
import torch

from wsi_pipeline.translators import conditions, losses, parts, paths, representations, sampler, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def tensor(recorded: other.Arrays, name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(recorded[name]))


class Affine:
    """out = mix x + time temb(t, 8) + bias; notes the times that it is asked for."""

    def __init__(self, recorded: other.Arrays, prefix: str) -> None:
        self.params = [
            tensor(recorded, f"{prefix}.{name}").requires_grad_() for name in ("mix", "time", "bias")
        ]
        self.times: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        assert t.dtype == torch.float32 and t.shape == x.shape[:1]
        self.times.append(float(t.detach()[0]))
        mix, time, bias = self.params
        half = time.shape[1] // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        offset = torch.cat([angles.cos(), angles.sin()], 1) @ time.T + bias
        return torch.einsum("oc,bc...->bo...", mix, x) + offset.reshape(*offset.shape, *[1] * (x.ndim - 2))

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, self.params))


def relative(found: torch.Tensor, wanted: npt.NDArray[np.float32], limit: float, what: str) -> None:
    other.close(found, wanted, limit * float(np.abs(wanted).max()), what)


def gradients_close(net: Affine, loss: torch.Tensor, recorded: other.Arrays, case: str, limit: float) -> None:
    for found, name in zip(net.gradients(loss), ("mix", "time", "bias"), strict=True):
        relative(found, recorded[f"{case}.grad_{name}"], limit, f"{case}.grad_{name}")


def bridge(beta_max: str, cond: bool = False, ode: bool = False) -> parts.Parts:
    # put together by hand: the recipe refuses cond with ode
    return parts.Parts(
        path=paths.BridgePath(settings.PathConfig(beta_max=float(beta_max), ode=ode, parity=True)),
        representation=representations.make_representation(settings.RepresentationConfig()),
        condition=conditions.Condition(settings.ConditionConfig(concat=cond)),
    )


def vp(
    steps: int = 1000,
    *,
    schedule: str = "linear",
    prediction: str = "epsilon",
    variance: str = "learned_range",
    haar: bool = False,
    sources: int = 0,
) -> parts.Parts:
    axes = ("z", "y", "x")
    return parts.make_parts(
        settings.DiffusionConfig(
            path=settings.PathConfig(
                kind="vp", steps=steps, schedule=schedule, prediction=prediction, variance=variance
            ),
            representation=settings.RepresentationConfig(
                kind="haar" if haar else "identity", axes=axes, ll_scale=3.0
            ),
            condition=settings.ConditionConfig(concat=sources > 0, sources=max(sources, 1)),
        )
    )


def test_parity_bridge_tables(other_set: Path) -> None:
    recorded = other.arrays(other_set, "bridge_cases")
    for case in other.prefixes(recorded, "schedule.N", ".std_fwd"):
        steps, beta_max = re.fullmatch(r"schedule\.N(\d+)\.beta_max(.+)", case).groups()
        path = paths.BridgePath(settings.PathConfig(steps=int(steps), beta_max=float(beta_max), parity=True))
        n, one, none = torch.arange(path.steps), torch.ones(path.steps, 1), torch.zeros(path.steps, 1)
        sums = torch.cat([path.forward[:1], path.forward.diff()])
        other.close(sums, recorded[f"{case}.betas_float64"], 1e-15, case)
        other.close(path.to_x0(n, none, -one)[:, 0], recorded[f"{case}.std_fwd"], 1e-6, case)
        other.close(path.backward.sqrt(), recorded[f"{case}.std_bwd"], 1e-6, case)
        other.close(path.sample(n, one, none, none)[:, 0], recorded[f"{case}.mu_x0"], 1e-6, case)
        other.close(path.sample(n, none, one, none)[:, 0], recorded[f"{case}.mu_x1"], 1e-6, case)
        other.close(path.sample(n, none, none, one)[:, 0], recorded[f"{case}.std_sb"], 1e-6, case)


def test_parity_bridge_time_and_steps(other_set: Path) -> None:
    recorded = other.arrays(other_set, "bridge_cases")
    for case in other.prefixes(recorded, "time_input.N", ""):
        steps = int(case.removeprefix("time_input.N"))
        path = paths.BridgePath(settings.PathConfig(steps=steps))
        other.close(path.time_input(torch.arange(steps)), recorded[case], 0.0, case)
    for case in other.prefixes(recorded, "steps.N", ""):
        steps, nfe = map(int, re.fullmatch(r"steps\.N(\d+)\.nfe(\d+)", case).groups())
        grid = paths.BridgePath(settings.PathConfig(steps=steps, parity=True)).grid(nfe)
        assert list(grid[::-1]) == recorded[case].tolist(), case
        exact = paths.BridgePath(settings.PathConfig(steps=steps)).grid(nfe)
        assert exact == (*grid[:-1], -1)


def test_parity_bridge_training(other_set: Path) -> None:
    recorded = other.arrays(other_set, "bridge_cases")
    x0, x1 = tensor(recorded, "x0"), tensor(recorded, "x1")
    for case in other.prefixes(recorded, "train.", ".x_t"):
        beta_max, mode = re.fullmatch(r"train\.beta_max(.+)\.case\d+\.(sde|ode)", case).groups()
        n = tensor(recorded, f"{case}.step")
        z = tensor(recorded, f"{case}.noise") if mode == "sde" else torch.full_like(x0, 9.0)
        for c in (0, 1):
            made = bridge(beta_max, cond=c == 1, ode=mode == "ode")
            x_n, name = made.path.sample(n, x0, x1, z), f"{case}.cond{c}"
            other.close(x_n, recorded[f"{case}.x_t"], 1e-6, case)
            other.close(made.path.target(n, x_n, x0, z), recorded[f"{case}.target"], 5e-5, case)
            net = Affine(recorded, f"net.cond{c}")
            out, none = made.ask(net, n, tensor(recorded, f"{case}.x_t"), x1, None)
            assert none is None
            other.close(out, recorded[f"{name}.net_out"], 5e-5, name)
            x0_hat = made.path.to_x0(n, x_n, out)
            other.close(x0_hat, recorded[f"{name}.pred_x0"], 3e-5, name)
            other.close(
                made.representation.clamp(x0_hat, -1, 1), recorded[f"{name}.pred_x0_clipped"], 3e-5, name
            )
            weight = settings.WeightConfig()
            loss, logs = losses.path_loss(net, made, weight, x0=x0, source=x1, label=None, n=n, z=z)
            other.close(loss, recorded[f"{name}.loss"], 1e-4, name)
            assert list(logs) == ["mse"] and not logs["mse"].requires_grad
            gradients_close(net, loss, recorded, name, 1e-4)


def test_parity_bridge_posterior(other_set: Path) -> None:
    recorded = other.arrays(other_set, "bridge_cases")
    x0, x1 = tensor(recorded, "x0"), tensor(recorded, "x1")
    for case in other.prefixes(recorded, "posterior.", ".sde"):
        beta_max, n, m = re.fullmatch(r"posterior\.beta_max(.+)\.n(\d+)\.m(\d+)", case).groups()
        for mode in ("sde", "ode"):
            path = bridge(beta_max, ode=mode == "ode").path
            z = tensor(recorded, f"{case}.noise") if path.draws(int(m)) else None
            assert path.draws(int(m)) == (mode == "sde" and f"{case}.noise" in recorded)
            x_m = path.stepper((int(n), int(m)))(0, x1, x0, z, None)
            limit = 2e-5 if int(n) - int(m) == 1 else 1e-6
            other.close(x_m, recorded[f"{case}.{mode}"], limit, f"{case}.{mode}")


def test_parity_bridge_sampling(other_set: Path) -> None:
    recorded = other.arrays(other_set, "bridge_cases")
    x1 = tensor(recorded, "x1")
    for case in other.prefixes(recorded, "sample.", ".x_final"):
        pattern = r"sample\.cond(\d)\.beta_max(.+)\.nfe(\d+)\.(sde|ode)(\.clip)?"
        c, beta_max, nfe, mode, clip = re.fullmatch(pattern, case).groups()
        noise = tensor(recorded, f"{case}.noise") if f"{case}.noise" in recorded else torch.empty(0)
        asked: list[int] = []
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def draws(k: int, noise: torch.Tensor = noise, asked: list[int] = asked) -> torch.Tensor:
            asked.append(k)
            return noise[k - 1]

        def watch(k: int, m: int, x: torch.Tensor, x0_hat: torch.Tensor, seen: list = seen) -> None:
            seen.append((x, x0_hat))

        net = Affine(recorded, f"net.cond{c}")
        sampling = settings.SamplingConfig(nfe=int(nfe), clip=bool(clip))
        made = bridge(beta_max, cond=c == "1", ode=mode == "ode")
        x = sampler.draw(net, made, sampling, source=x1, noise=draws, watch=watch)
        assert asked == list(range(1, len(noise) + 1))
        other.close(x, recorded[f"{case}.x_final"], 2e-5, case)
        other.close(np.float32(net.times), recorded[f"{case}.time_inputs"], 0.0, case)
        if f"{case}.pred_x0_last" in recorded:
            other.close(seen[-1][1], recorded[f"{case}.pred_x0_last"], 2e-5, case)
        if f"{case}.states" in recorded:
            states, estimates = (torch.stack(one[::-1], 1) for one in zip(*seen, strict=True))
            other.close(states, recorded[f"{case}.states"], 2e-5, case)
            other.close(estimates, recorded[f"{case}.pred_x0"], 2e-5, case)


def test_parity_bridge_masked(other_set: Path) -> None:
    recorded = other.arrays(other_set, "bridge_cases")
    for case in other.prefixes(recorded, "masked.", ".states"):
        noise = tensor(recorded, f"{case}.noise_in_call_order")
        asked: list[int] = []
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def draws(k: int, noise: torch.Tensor = noise, asked: list[int] = asked) -> torch.Tensor:
            asked.append(k)
            return noise[len(asked) - 1]

        def watch(k: int, m: int, x: torch.Tensor, x0_hat: torch.Tensor, seen: list = seen) -> None:
            seen.append((x, x0_hat))

        sampler.draw(
            Affine(recorded, "net.cond0"),
            bridge("1", ode=case.endswith(".ode")),
            settings.SamplingConfig(nfe=recorded[f"{case}.states"].shape[1], clip=False),
            noise=draws,
            known=(tensor(recorded, "masked.mask"), tensor(recorded, "x0")),
            watch=watch,
        )
        assert len(asked) == len(set(asked)) == len(noise)
        states, estimates = (torch.stack(one[::-1], 1) for one in zip(*seen, strict=True))
        other.close(states, recorded[f"{case}.states"], 2e-5, case)
        other.close(estimates, recorded[f"{case}.pred_x0"], 2e-5, case)


def test_parity_vp_tables_and_p2_weights(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    for case in other.prefixes(recorded, "schedule.T", ".betas"):
        steps, schedule = re.fullmatch(r"schedule\.T(\d+)\.(\w+)", case).groups()
        path = vp(int(steps), schedule=schedule).path
        assert isinstance(path, paths.VPPath)
        found = {
            "betas": path.betas,
            "alphas_cumprod": path.abar,
            "snr": path.snr(torch.arange(path.steps)),
            "posterior_log_variance_clipped": path.reverse.log_small,
            "posterior_mean_coef1": path.reverse.of_x0,
            "posterior_mean_coef2": path.reverse.of_x,
        }
        for name, table in found.items():
            wanted = recorded[f"{case}.{name}"]
            off = np.abs(table.numpy() / np.where(wanted == 0, 1, wanted) - (wanted != 0)).max()
            assert off < 1e-6, (case, name, off)
        for name in [key for key in recorded if key.startswith(f"{case}.weight.")]:
            gamma, k = map(float, re.search(r"gamma(.+)\.k(.+)$", name).groups())
            weight = settings.WeightConfig(kind="p2", gamma=gamma, k=k)
            other.close(
                losses.step_weights(path, weight, torch.arange(path.steps)), recorded[name], 1e-6, name
            )


def p2_image(recorded: other.Arrays, extremes: bool) -> torch.Tensor:
    levels = recorded["x0_with_extremes_uint8" if extremes else "x0_uint8"]
    return torch.from_numpy(levels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def p2_terms_close(
    net: object,
    made: parts.Parts,
    weight: settings.WeightConfig,
    recorded: other.Arrays,
    case: str,
    batch: dict[str, torch.Tensor],
) -> None:
    """Each sample's terms, by batches of one."""
    for i, t in enumerate(batch["n"].tolist()):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        ask = net.one(i) if isinstance(net, Recorded) else net
        _, logs = losses.path_loss(ask, made, weight, source=None, label=None, **one)
        mse, vb = recorded[f"{case}.mse"][i], recorded[f"{case}.vb"][i]
        assert float(logs["mse"]) == pytest.approx(float(mse), rel=1e-5), (case, t)
        assert float(logs["vlb"]) == pytest.approx(float(vb), rel=5e-5 if t else 1e-5), (case, t)


class Recorded:
    """A network that returns given arrays."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out

    def one(self, i: int) -> Recorded:
        return Recorded(self.out[i : i + 1])

    def __call__(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        return self.out


def test_parity_p2_training(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    for case in other.prefixes(recorded, "train.", ".grad_bias"):
        start, schedule, j, gamma, k = re.fullmatch(
            r"(train\.(\w+)\.case(\d+))\.gamma(.+)\.k(.+)", case
        ).groups()
        made, net = vp(schedule=schedule), Affine(recorded, "net")
        batch = {
            "x0": p2_image(recorded, extremes=j == "0"),
            "n": tensor(recorded, f"{start}.t"),
            "z": tensor(recorded, f"{start}.noise"),
        }
        x_n = made.path.sample(batch["n"], batch["x0"], None, batch["z"])
        other.close(x_n, recorded[f"{start}.x_t"], 1e-6, start)
        out = net(tensor(recorded, f"{start}.x_t"), made.path.time_input(batch["n"]), None)
        other.close(out, recorded[f"{start}.net_out"], 1e-4, start)
        weight = settings.WeightConfig(kind="p2", gamma=float(gamma), k=float(k))
        p2_terms_close(net, made, weight, recorded, case, batch)
        loss, _ = losses.path_loss(net, made, weight, source=None, label=None, **batch)
        assert loss.item() == pytest.approx(float(recorded[f"{case}.loss"].mean()), rel=5e-5)
        gradients_close(net, loss, recorded, case, 1e-4)


def test_parity_p2_other_lengths(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    for case in other.prefixes(recorded, "train_T", ".vb_no_rescale"):
        steps, schedule = re.fullmatch(r"train_T(\d+)\.(\w+)", case).groups()
        batch = {
            "x0": p2_image(recorded, extremes=False),
            "n": tensor(recorded, f"{case}.t"),
            "z": tensor(recorded, f"train.{schedule}.case0.noise"),
        }
        made, net = vp(int(steps), schedule=schedule), Affine(recorded, "net")
        weight = settings.WeightConfig(kind="p2")
        p2_terms_close(net, made, weight, recorded, case, batch)
        bare = settings.WeightConfig(kind="p2", vlb=1000 / int(steps))
        _, logs = losses.path_loss(net, made, bare, source=None, label=None, **batch)
        assert float(logs["vlb"]) == pytest.approx(float(recorded[f"{case}.vb_no_rescale"].mean()), rel=1e-5)


def test_parity_p2_near_the_truth(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    batch = {
        "x0": p2_image(recorded, extremes=True),
        "n": tensor(recorded, "near_truth.t"),
        "z": tensor(recorded, "near_truth.noise"),
    }
    for case in other.prefixes(recorded, "near_truth.", ".grad_net_out"):
        made, weight = vp(schedule=case.split(".")[1]), settings.WeightConfig(kind="p2")
        out = tensor(recorded, "near_truth.net_out").requires_grad_()
        p2_terms_close(Recorded(out), made, weight, recorded, case, batch)
        loss, _ = losses.path_loss(Recorded(out), made, weight, source=None, label=None, **batch)
        (gradient,) = torch.autograd.grad(loss, out)
        relative(gradient, recorded[f"{case}.grad_net_out"], 1e-4, case)


def test_parity_p2_reverse_steps(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    made = vp()
    path = made.path
    assert isinstance(path, paths.VPPath)
    for case in other.prefixes(recorded, "reverse.", ".x_prev"):
        t, clip = map(int, re.fullmatch(r"reverse\.t(\d+)\.clip(\d)", case).groups())
        x, z, net = (
            tensor(recorded, f"{case}.x_t"),
            tensor(recorded, f"{case}.noise"),
            Affine(recorded, "net"),
        )
        with torch.no_grad():
            x0_hat, v = sampler.estimate(net, made, t, x, None, None, 1.0)
        x0_hat = made.representation.clamp(x0_hat, -1, 1) if clip else x0_hat
        relative(x0_hat, recorded[f"{case}.pred_x0"], 5e-5, case)
        step = path.stepper((t, t - 1))
        relative(step(0, x, x0_hat, torch.zeros_like(z), v), recorded[f"{case}.mean"], 1e-5, case)
        relative(
            step(0, x, x0_hat, z if path.draws(t - 1) else None, v), recorded[f"{case}.x_prev"], 1e-5, case
        )
        relative(path.reverse.log_variance(t, x, v), recorded[f"{case}.log_variance"], 1e-5, case)
        ddim = path.stepper((t, t - 1), "ddim")(0, x, x0_hat, None, v)
        relative(ddim, recorded[f"{case}.ddim_x_prev"], 3e-4, case)


def test_parity_kept_steps(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    path = vp().path
    for case in other.prefixes(recorded, "respace.", ""):
        name = case.removeprefix("respace.")
        counts = [int(count) for count in name.removeprefix("ddim").split("_")]
        if name.startswith("ddim"):
            kept = path.grid(counts[0], "ddim")[-2::-1]
        elif len(counts) == 1:
            kept = path.grid(counts[0])[-2::-1]
        else:
            kept = paths.spaced_steps(path.steps, counts)
        assert list(kept) == recorded[case].tolist(), case


def test_parity_p2_chains(other_set: Path) -> None:
    recorded = other.arrays(other_set, "p2_cases")
    noise = tensor(recorded, "chain4.noise_in_call_order")
    for case in other.prefixes(recorded, "chain4", ".x_final"):
        kept = recorded[f"{case}.timestep_map"]
        method = "ddim" if case.endswith("ddim") else "ancestral"
        net = Affine(recorded, "net")
        sampling = settings.SamplingConfig(nfe=len(kept), method=method)
        x = sampler.draw(net, vp(), sampling, noise=lambda k: noise[k])
        other.close(x, recorded[f"{case}.x_final"], 5e-4, case)
        assert net.times == kept[::-1].tolist()
        if f"{case}.betas" in recorded:
            path = vp().path
            assert isinstance(path, paths.VPPath)
            log_beta = paths.Reverse(path.abar[torch.from_numpy(kept)], "learned_range").log_beta
            other.close(log_beta.exp(), recorded[f"{case}.betas"], 1e-12, case)


def haar(*axes: str, scale: float = 1.0) -> representations.Representation:
    return representations.make_representation(
        settings.RepresentationConfig(kind="haar", axes=axes, ll_scale=scale)
    )


def test_parity_haar_bands(other_set: Path) -> None:
    recorded = other.arrays(other_set, "wavelet_cases")
    for name, axes in (("dwt2", ("y", "x")), ("dwt3", ("z", "y", "x"))):
        letters = [""]
        for _ in axes:
            letters = [start + end for start in letters for end in "LH"]
        rep, x = haar(*axes), tensor(recorded, f"{name}.x")
        bands = torch.cat([tensor(recorded, f"{name}.{band}") for band in letters], 1)
        other.close(rep.encode(x), bands.numpy(), 2e-6, name)
        other.close(rep.decode(bands), recorded[f"{name}.inverse"], 2e-6, name)
    rep, x = haar("z", "y", "x", scale=3.0), tensor(recorded, "dwt3.x")
    other.close(rep.encode(x), recorded["dwt3.packed_LLL_div3"], 2e-6)
    other.close(
        rep.decode(tensor(recorded, "dwt3.packed_LLL_div3")), recorded["dwt3.inverse_of_packed"], 2e-6
    )
    stacked = recorded["dwt3.two_channels.bands_stacked"]
    found = haar("z", "y", "x").encode(tensor(recorded, "dwt3.two_channels.x"))
    other.close(found, np.concatenate(list(stacked), 1), 2e-6, "band-major, then channel")


def test_parity_haar_of_impulses_and_constants(other_set: Path) -> None:
    recorded = other.arrays(other_set, "wavelet_cases")
    for name in other.prefixes(recorded, "dwt3.impulse_at_", ""):
        bands = recorded[name]
        d, h, w = map(int, re.fullmatch(r".*_d(\d+)_h(\d+)_w(\d+)", name).groups())
        x = torch.zeros(1, 1, *(2 * size for size in bands.shape[2:]))
        x[0, 0, d, h, w] = 1.0
        other.close(haar("z", "y", "x").encode(x), bands, 2e-6, name)
    for case in other.prefixes(recorded, "dwt3.constant_", ".packed"):
        packed = recorded[f"{case}.packed"]
        x = torch.full((1, 1, *(2 * size for size in packed.shape[2:])), float(case.split("_")[-1]))
        other.close(haar("z", "y", "x", scale=3.0).encode(x), packed, 2e-6, case)


def volumes(recorded: other.Arrays, target: str) -> torch.Tensor:
    """The three other contrasts, in the published order."""
    names = [name for name in ("t1n", "t1c", "t2w", "t2f") if name != target]
    return torch.cat([tensor(recorded, f"cwdm.volume.{name}") for name in names], 1)


def wavelet(system: str) -> parts.Parts:
    sources = 3 if system == "cwdm" else 0
    return vp(prediction="sample", variance="fixed_large", haar=True, sources=sources)


@pytest.mark.parametrize("system", ["wdm", "cwdm"])
def test_parity_wavelet_training(other_set: Path, system: str) -> None:
    recorded = other.arrays(other_set, "wavelet_cases")
    made = wavelet(system)
    for case in other.prefixes(recorded, f"{system}.train.", ".loss"):
        target = case.split(".")[-1]
        source = volumes(recorded, target) if system == "cwdm" else None
        x0 = tensor(recorded, f"cwdm.volume.{target}" if system == "cwdm" else "wdm.x0")
        _, source_h = made.encode_source(source)
        if source_h is not None and f"cwdm.condition_for_{target}" in recorded:
            other.close(source_h, recorded[f"cwdm.condition_for_{target}"], 2e-6, case)
        net, n = Affine(recorded, f"{system}.net"), tensor(recorded, f"{case}.t")
        z = tensor(recorded, f"{case}.noise_image_space")
        rep = made.representation
        x_n = made.path.sample(n, rep.encode(x0), None, rep.encode_noise(z))
        out, _ = made.ask(net, n, x_n, source_h, None)
        other.close(out, recorded[f"{case}.net_out"], 5e-5, case)
        other.close(rep.decode(out), recorded[f"{case}.net_out_volume"], 5e-5, case)

        def loss_of(
            bands: tuple[float, ...] | str,
            net: Affine = net,
            x0: torch.Tensor = x0,
            source: torch.Tensor | None = source,
            n: torch.Tensor = n,
            z: torch.Tensor = z,
        ) -> torch.Tensor:
            weight = settings.WeightConfig(kind="bands", bands=bands)
            return losses.path_loss(net, made, weight, x0=x0, source=source, label=None, n=n, z=z)[0]

        loss = loss_of("equal")
        other.close(loss, recorded[f"{case}.loss"], 1e-5, case)
        gradients_close(net, loss, recorded, case, 1e-5)
        for i, wanted in enumerate(recorded[f"{case}.band_mse"]):
            one = loss_of(tuple(float(rep.bands * (band == i)) for band in range(rep.bands)))
            other.close(one, wanted, 5e-5, f"{case} band {i}")


@pytest.mark.parametrize("system", ["wdm", "cwdm"])
def test_parity_wavelet_reverse_steps(other_set: Path, system: str) -> None:
    recorded = other.arrays(other_set, "wavelet_cases")
    made = wavelet(system)
    path = made.path
    assert isinstance(path, paths.VPPath)
    steps = re.findall(r"_t(\d+)", next(key for key in recorded if "fixed_large_variance" in key))
    wanted = recorded[f"{system}.fixed_large_variance_" + "_".join(f"t{step}" for step in steps)]
    other.close(path.reverse.log_fixed[[int(step) for step in steps]].exp(), wanted, 1e-10, system)
    low, source_h = (-1.0, None) if system == "wdm" else (0.0, tensor(recorded, "cwdm.condition_for_t1n"))
    for case in other.prefixes(recorded, f"{system}.reverse.", ".x_prev"):
        t, clip = map(int, re.fullmatch(r"\w+\.reverse\.t(\d+)\.clip(\d)", case).groups())
        x, z = tensor(recorded, f"{case}.x_t"), tensor(recorded, f"{case}.noise")
        with torch.no_grad():
            x0_hat, v = sampler.estimate(Affine(recorded, f"{system}.net"), made, t, x, source_h, None, 1.0)
        x0_hat = made.representation.clamp(x0_hat, low, 1.0) if clip else x0_hat
        other.close(x0_hat, recorded[f"{case}.pred_x0"], 5e-5, case)
        step = path.stepper((t, t - 1))
        other.close(step(0, x, x0_hat, torch.zeros_like(z), v), recorded[f"{case}.mean"], 2e-5, case)
        x_m = step(0, x, x0_hat, z if path.draws(t - 1) else None, v)
        other.close(x_m, recorded[f"{case}.x_prev"], 2e-5, case)
        log_variance = path.reverse.log_variance(t, x, v).reshape(-1).expand(len(x))
        other.close(log_variance, recorded[f"{case}.log_variance"], 1e-5, case)


@pytest.mark.parametrize("system", ["wdm", "cwdm"])
def test_parity_wavelet_chains(other_set: Path, system: str) -> None:
    recorded = other.arrays(other_set, "wavelet_cases")
    if f"{system}.chain4.states" not in recorded:
        pytest.skip("the set has no chain")
    made, net = wavelet(system), Affine(recorded, f"{system}.net")
    plain = haar("z", "y", "x")  # bands of standard normals back to normals of pixels
    noise = [tensor(recorded, f"{system}.chain.start"), *tensor(recorded, f"{system}.chain4.noise")]
    states: list[torch.Tensor] = []
    value_range = (-1.0, 1.0) if system == "wdm" else (0.0, 1.0)
    source = volumes(recorded, "t1n") if system == "cwdm" else None
    volume = sampler.draw(
        net,
        made,
        settings.SamplingConfig(nfe=len(recorded[f"{system}.chain4.states"])),
        source=source,
        noise=lambda k: plain.decode(noise[k]),
        value_range=value_range,
        watch=lambda k, m, x, x0_hat: states.append(made.representation.encode(x)),
    )
    assert net.times == recorded[f"{system}.chain4.time_inputs"].tolist()
    other.close(torch.stack(states), recorded[f"{system}.chain4.states"], 2e-5, system)
    other.close(volume, recorded[f"{system}.chain4.volume"], 2e-5, system)

    # The end of the full chain, from the same start.
    wanted = recorded[f"{system}.last4.states"]
    grid = range(len(wanted) - 1, -2, -1)
    step, x, z = made.path.stepper(grid), noise[0], tensor(recorded, f"{system}.last4.noise")
    for k, (n, m) in enumerate(pairwise(grid)):
        with torch.no_grad():
            x0_hat, v = sampler.estimate(net, made, n, x, made.encode_source(source)[1], None, 1.0)
        x0_hat = made.representation.clamp(x0_hat, *value_range)
        x = step(k, x, x0_hat, z[k] if made.path.draws(m) else None, v)
        other.close(x, wanted[k], 2e-5, f"{system}.last4 {k}")
