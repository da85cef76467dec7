"""Objectives: what each update sees and moves, one direction in memory at a time, draws by number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from wsi_pipeline.models.backbones import make_backbone
from wsi_pipeline.models.discriminator import Discriminator, MultilevelHead, multilevel_loss
from wsi_pipeline.training.adversarial import (
    AdversarialConfig,
    AdversarialObjective,
    keyed_draws,
    posterior_noise,
)
from wsi_pipeline.training.config import OptimiserConfig
from wsi_pipeline.training.loop import Iteration
from wsi_pipeline.training.objective import Sample
from wsi_pipeline.training.paired import PairedConfig, PairedObjective, gradient_difference

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 64
UPDATES = [
    ("generator", "cycle"),
    ("generator", "gan"),
    ("generator", "identity"),
    ("discriminator", "fake"),
    ("discriminator", "real"),
]


class Net(nn.Module):
    """A stand-in for the generator: a convolution for each direction; notes what it is asked."""

    latent_channels = 4

    def __init__(self, directions: Sequence[str] = ("a2b", "b2a")) -> None:
        super().__init__()
        self.directions = tuple(directions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.ModuleDict({d: nn.Conv2d(3, 3, 3, padding=1) for d in directions})
        self.learning = dict(self.layers.named_parameters())
        self.calls: list[str] = []
        self.noises: list[Tensor | None] = []

    def forward(self, x: Tensor, direction: str, noise: Tensor | None = None) -> Tensor:
        self.calls.append(direction)
        self.noises.append(noise)
        return torch.tanh(self.layers[direction](x))


class Judge(nn.Module):
    """A stand-in for a discriminator that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, draws: Any) -> list[Tensor]:
        self.seen.append(x.detach())
        return [x.mean((2, 3)) * self.weight]


def judges() -> dict[str, Discriminator]:
    made = {}
    for seed, direction in enumerate(("a2b", "b2a")):
        backbone = make_backbone("tiny")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made[direction] = Discriminator(backbone, MultilevelHead(backbone.widths, hidden=4)).train()
    return made


def adversarial(perceptual: Any = None, **options: Any) -> AdversarialObjective:
    config = AdversarialConfig(lpips=perceptual is not None, **options)
    return AdversarialObjective(Net(), judges(), config, perceptual)


def sample(numbers: Sequence[int] = (0,), first: bool = True) -> Sample:
    """Pictures that depend on their numbers."""
    random = [np.random.default_rng(number) for number in numbers]
    source, target = (
        torch.from_numpy(np.stack([r.uniform(-1, 1, (3, SIDE, SIDE)) for r in random])).float()
        for _ in range(2)
    )
    return Sample(source=source, target=target, numbers=np.array(numbers), seed=3, first=first)


def gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def clear(objective: AdversarialObjective, group: str) -> None:
    for parameter in objective.groups[group].values():
        parameter.grad = None


def until(objective: AdversarialObjective, name: str, clears: bool = True) -> Any:
    """Run the updates up to and with ``name``; a group's gradients are cleared after each of its updates."""
    for update in objective.updates(sample()):
        for term in update.terms:
            term.loss.backward()
        if update.name == name:
            return update
        clear(objective, update.group)
    raise AssertionError(name)


# Updates


def test_an_iteration_has_five_updates() -> None:
    objective, found = adversarial(), []
    for update in objective.updates(sample()):
        found.append((update.group, update.name))
        assert len([term.loss.backward() for term in update.terms]) == 2
    assert found == UPDATES


def test_each_update_gives_gradients_to_its_group_alone() -> None:
    for group, name in UPDATES:
        objective = adversarial()
        until(objective, name)
        for other, parameters in objective.groups.items():
            missing = [p.grad is None for p in parameters.values()]
            assert not any(missing) if other == group else all(missing), (name, other)


def test_the_published_leak_is_there_only_if_told() -> None:
    """Legacy: what the gan update leaves is still there in the fake update, and added to its own."""
    fixed, legacy = adversarial(), adversarial(legacy_disc_grad_leak=True)
    left = until(legacy, "gan") and gradients(legacy.groups["discriminator"])
    assert all(gradient is not None for gradient in left.values())
    until(fixed, "gan")
    assert all(p.grad is None for p in fixed.groups["discriminator"].values())
    pushed = gradients(legacy.groups["generator"])
    for name, parameter in fixed.groups["generator"].items():
        assert torch.equal(parameter.grad, pushed[name]), "freezing must not change the generator's gradients"
    fixed, legacy = adversarial(), adversarial(legacy_disc_grad_leak=True)
    own = until(fixed, "fake") and gradients(fixed.groups["discriminator"])
    until(legacy, "fake")
    for name, parameter in legacy.groups["discriminator"].items():
        assert torch.allclose(parameter.grad, own[name] + left[name], atol=1e-6), name


def test_judges_learn_again_after_the_gan_update() -> None:
    objective = adversarial()
    until(objective, "real")
    assert all(p.requires_grad for p in objective.groups["discriminator"].values())


def test_judges_see_what_their_direction_makes_and_what_it_shall_look_like() -> None:
    net, shown = Net(), {"a2b": Judge(), "b2a": Judge()}
    objective, one = AdversarialObjective(net, shown, AdversarialConfig(lpips=False), None), sample()
    for update in objective.updates(one):
        for term in update.terms:
            term.loss.backward()
    fakes = {"a2b": net(one.source, "a2b").detach(), "b2a": net(one.target, "b2a").detach()}
    reals = {"a2b": one.target, "b2a": one.source}
    for direction, judge in shown.items():
        gan, fake, real = judge.seen
        assert torch.equal(gan, fakes[direction])
        assert torch.equal(fake, gan)
        assert torch.equal(real, reals[direction])


def test_losses_are_those_of_the_formulae() -> None:
    def perceptual(found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).square().mean((1, 2, 3))

    objective, net, one = adversarial(perceptual), Net(), sample((4, 5))
    logs: dict[str, float] = {}
    for update in objective.updates(one):
        for term in update.terms:
            logs |= {name: float(value) for name, value in term.logs.items()}
    a, b = one.source, one.target
    with torch.no_grad():
        back = net(net(a, "a2b"), "b2a")
        cycle = (back - a).abs().mean() + 10 * perceptual(back, a).mean()
        same = net(b, "a2b")
        identity = (same - b).abs().mean() + perceptual(same, b).mean()
        change = (net(a, "a2b") - a).abs().mean()
    assert logs["cycle_a"] == pytest.approx(float(cycle), rel=1e-5)
    assert logs["idt_a"] == pytest.approx(float(identity), rel=1e-5)
    assert logs["change_a"] == pytest.approx(float(change), rel=1e-5)
    zero = float(multilevel_loss([torch.zeros(1, 1)] * 3, 1.0))
    assert logs["gan_a"] == pytest.approx(0.5 * zero, rel=0.5), "judges know nothing yet"
    assert logs.keys() == {
        *("cycle_a", "cycle_b", "gan_a", "gan_b", "change_a", "change_b", "idt_a", "idt_b"),
        *("disc_a_fake", "disc_b_fake", "disc_a_real", "disc_b_real"),
    }


# One direction in memory at a time


def test_a_term_is_computed_when_it_is_asked_for() -> None:
    net = Net()
    objective = AdversarialObjective(net, judges(), AdversarialConfig(lpips=False), None)
    counts = []
    for update in objective.updates(sample()):
        for term in update.terms:
            counts.append(len(net.calls))
            term.loss.backward()
    assert counts == [2, 4, 5, 6, 7, 8, 8, 8, 8, 8], "eight passes of the generator, and none ahead of time"


@pytest.mark.parametrize("name", ["cycle", "gan", "identity"])
def test_two_directions_need_the_memory_of_one(name: str) -> None:
    lazy, eager = peak(name, eager=False), peak(name, eager=True)
    assert lazy < 0.6 * eager


def peak(name: str, eager: bool) -> int:
    """Largest sum of bytes that are kept for backward passes while one update is run."""
    live, most = [0], [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            live[0] += tensor.nbytes
            most[0] = max(most[0], live[0])

        def __del__(self) -> None:
            live[0] -= self.tensor.nbytes

    objective = adversarial()
    for update in objective.updates(sample()):
        if update.name == name:
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
                for term in list(update.terms) if eager else update.terms:
                    term.loss.backward()
            return most[0]
        for term in update.terms:
            term.loss.backward()
    raise AssertionError(name)


# Micro-batches


class Recorder:
    """An optimiser that keeps gradients and moves nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters, self.steps = parameters, []
        self.param_groups: list[dict[str, Any]] = [{}]

    def step(self) -> None:
        self.steps.append(gradients(self.parameters))

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1)])
def test_micro_batches_give_the_gradients_of_one_batch(sizes: tuple[int, ...], leak: bool) -> None:
    found = []
    for cut in ((4,), sizes):
        objective = adversarial(legacy_disc_grad_leak=leak)
        recorders = {group: Recorder(parameters) for group, parameters in objective.groups.items()}
        iteration = Iteration(
            objective=objective,
            optimisers=recorders,
            config=OptimiserConfig(clip=1e9),
            accelerator=Accelerator(cpu=True),
            steps=1,
        )
        ends = np.cumsum((0, *cut)).tolist()
        pairs = zip(ends, ends[1:], strict=False)
        logs = iteration.run(0, [sample(range(at, end), first=at == 0) for at, end in pairs])
        steps = [step for recorder in recorders.values() for step in recorder.steps]
        found.append((steps, logs, {name: b.clone() for name, b in objective.buffers.items()}))
    (whole, logs, buffers), (parts, others, moved) = found
    assert len(whole) == len(parts) == 5
    for one, other in zip(whole, parts, strict=True):
        for name, gradient in one.items():
            assert torch.allclose(gradient, other[name], rtol=1e-4, atol=1e-5), name
    for name, value in logs.items():
        assert float(others[name]) == pytest.approx(float(value), abs=1e-5), name
    for name, buffer in buffers.items():
        assert torch.allclose(moved[name], buffer, atol=1e-6), name


# Draws


def test_augmentation_is_drawn_from_the_number() -> None:
    drawn = keyed_draws(("color", "translation", "cutout"))
    both = drawn(sample((3, 8)), "gan_a", SIDE, SIDE)
    for place, number in enumerate((3, 8)):
        alone = drawn(sample((number,)), "gan_a", SIDE, SIDE)
        assert all(torch.equal(one, many[place : place + 1]) for one, many in zip(alone, both, strict=True))
    other = drawn(sample((3, 8)), "fake_a", SIDE, SIDE)
    assert not torch.equal(both.brightness, other.brightness)


def test_noise_is_drawn_from_the_number() -> None:
    both = posterior_noise(sample((3, 8)), sample((3, 8)).source, 4, "cycle_a2b")
    assert both.shape == (2, 4, SIDE // 8, SIDE // 8)
    alone = posterior_noise(sample((8,)), sample((8,)).source, 4, "cycle_a2b")
    assert torch.equal(both[1:], alone)
    assert not torch.equal(alone, posterior_noise(sample((8,)), sample((8,)).source, 4, "gan_a2b"))


def test_latents_are_sampled_only_if_told() -> None:
    for latent, sampled in (("mode", False), ("sample", True)):
        net = Net()
        config = AdversarialConfig(lpips=False, latent=latent)
        for update in AdversarialObjective(net, judges(), config, None).updates(sample()):
            for term in update.terms:
                term.loss.backward()
        assert len(net.noises) == 8
        assert all((noise is not None) == sampled for noise in net.noises)


def test_the_global_generator_decides_nothing() -> None:
    before = torch.get_rng_state()
    until(adversarial(latent="sample"), "real")
    assert torch.equal(torch.get_rng_state(), before)


# Pairs


def test_paired_losses_are_those_of_the_formulae() -> None:
    net, one = Net(), sample((0, 1))
    (update,) = PairedObjective(net, PairedConfig(l1=2.0, gradient=3.0), None).updates(one)
    (a, b), found = list(update.terms), net(one.source, "a2b").detach()
    error = (found - one.target).numpy()
    l1 = np.abs(error).mean()
    edges = np.abs(np.diff(error, axis=2)).mean() + np.abs(np.diff(error, axis=3)).mean()
    assert float(a.loss.detach()) == pytest.approx(2 * l1 + 3 * edges, rel=1e-5)
    assert float(a.logs["change_a"]) == pytest.approx(float((found - one.source).abs().mean()), rel=1e-5)
    back = net(one.target, "b2a").detach()
    assert float(b.logs["l1_b"]) == pytest.approx(float((back - one.source).abs().mean()), rel=1e-5)
    assert net.calls[:2] == ["a2b", "b2a"]


def test_one_direction_is_one_term() -> None:
    objective = PairedObjective(Net(("a2b",)), PairedConfig(), None)
    (update,) = objective.updates(sample())
    assert len(list(update.terms)) == 1
    assert set(objective.groups) == {"generator"}


def test_a_shift_of_brightness_has_no_edges() -> None:
    one = sample().source
    assert float(gradient_difference(one + 0.25, one)) == pytest.approx(0.0, abs=1e-6)
    assert float(gradient_difference(-one, one)) > 0.5
