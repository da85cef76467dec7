"""Training from rough pairs: what each loss moves, whose turn it is, masks, draws; commutation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.models.bundle import load_bundle
from wsi_pipeline.models.plain_unet import PlainUNet
from wsi_pipeline.models.registration import RegistrationConfig
from wsi_pipeline.models.trainable import TurboNetwork
from wsi_pipeline.models.warp import Field
from wsi_pipeline.training.aligned import Aligned, AlignedConfig, AlignedObjective, aligned_networks
from wsi_pipeline.training.equivariance import (
    EquivarianceConfig,
    WithCommutation,
    commutation_error,
    dihedral,
)
from wsi_pipeline.training.objective import Sample
from wsi_pipeline.training.paired import PairedConfig, PairedObjective

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
NETWORKS = RegistrationConfig(rigid=(4, 8), fields=(4, 8), judge=(4, 8))

# Which networks each loss moves: translator, rigid, cross, intra, judge.
MOVES = {
    "rigid": {"rigid"},
    "cross": {"cross"},
    "intra": {"translator", "intra"},
    "commutation": {"translator"},
    "own": {"translator"},
    "rigidity_cross_forward": {"cross"},
    "rigidity_cross_inverse": {"cross"},
    "rigidity_total_forward": {"intra", "translator"},
    "rigidity_total_inverse": {"intra", "translator"},
    "rotation": {"rigid"},
    "shift": {"rigid"},
}


def sample(count: int = 2, masks: bool = False, first: bool = True) -> Sample:
    random = [np.random.default_rng(n) for n in range(count)]
    images = [
        torch.from_numpy(np.stack([r.uniform(-1, 1, (3, SIDE, SIDE)) for r in random])).float()
        for _ in range(2)
    ]
    source, target = (F.avg_pool2d(image, 5, 1, 2) for image in images)
    mask = torch.ones(count, 1, SIDE, SIDE)
    mask[..., :8] = 0
    return Sample(
        source=source,
        target=target,
        numbers=np.arange(count),
        seed=3,
        first=first,
        source_mask=mask if masks else None,
    )


def make(*, moved: bool = True, **options: object) -> AlignedObjective:
    """With tiny networks; ``moved``: registration that does something, so that no gradient is 0 by chance."""
    config = replace(AlignedConfig(networks=NETWORKS), **options)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PlainUNet(3, 3, (4, 8), 2)
        registration, judge = aligned_networks(config, 5)
        if moved:
            for layer in (
                registration["rigid"].linear,
                registration["cross"].final_conv,
                registration["intra"].final_conv,
            ):
                nn.init.normal_(layer.weight, std=0.3)
                nn.init.normal_(layer.bias, std=0.1)
    learning = {f"translator.{name}": p for name, p in network.named_parameters()}
    return AlignedObjective(network, learning, registration, judge, config)


def numbers(found: Aligned) -> dict[str, float]:
    return {name: value.item() for name, value in found.losses.items()}


def parameters(objective: AlignedObjective) -> dict[str, nn.Parameter]:
    return {name: p for group in objective.groups.values() for name, p in group.items()}


def moved_by(objective: AlignedObjective, loss: Tensor) -> dict[str, bool]:
    """Networks that a loss has a path to, and whether the gradient is anything but 0."""
    named = parameters(objective)
    for p in named.values():
        p.grad = None
    loss.backward(retain_graph=True)
    found: dict[str, bool] = {}
    for name, p in named.items():
        if p.grad is not None:
            part = name.removeprefix("registration.").partition(".")[0]
            found[part] = found.get(part, False) or bool(p.grad.abs().max() > 0)
    return found


# What each loss moves (D4)


def test_each_loss_moves_its_networks_and_no_other() -> None:
    objective = make(own=1.0, max_rotation=0.0, max_shift=0.0)
    losses = objective.align(sample()).losses
    assert losses.keys() == MOVES.keys()
    for name, loss in losses.items():
        found = moved_by(objective, loss)
        assert set(found) == MOVES[name] and all(found.values()), name


@pytest.mark.parametrize(
    ("options", "networks"),
    [({}, {"translator", "intra"}), ({"common_frame": False}, {"translator", "intra"})],
)
def test_the_adversarial_loss_moves_the_translator_and_psi(
    options: Mapping[str, object], networks: set[str]
) -> None:
    silent = {name: 0.0 for name in ("rigid", "cross", "intra", "commutation")}
    objective = make(
        **silent, forward_rigidity=0.0, inverse_rigidity=0.0, max_rotation=90.0, adversarial=1.0, **options
    )
    judge, generator = objective.updates(sample(4))
    (real, fake), (generated,) = judge.terms, generator.terms
    for term in (real, fake):
        assert moved_by(objective, term.loss) == {"judge": True}
    found = moved_by(objective, generated.loss)
    assert {name for name, is_moved in found.items() if is_moved} == networks
    assert "judge" not in found
    assert all(p.requires_grad for p in objective.groups["discriminator"].values())


def test_the_plain_variant_compares_without_the_turn() -> None:
    turned, plain = (make(implicit=implicit).align(sample()) for implicit in (True, False))
    assert turned.losses["intra"] != plain.losses["intra"]
    assert turned.losses["commutation"] == plain.losses["commutation"]


# Turns of judge and generator


def test_the_judge_learns_from_the_first_half_and_the_generator_from_the_second() -> None:
    objective, batch = make(), sample(4)
    updates = list(objective.updates(batch))
    assert [(u.group, u.name) for u in updates] == [("discriminator", "judge"), ("generator", "aligned")]

    def logs(part: Sample) -> list[dict[str, float]]:
        # Evaluation mode (not the first micro-batch): the judge's norms stay.
        return [
            {name: float(value) for term in u.terms for name, value in term.logs.items()}
            for u in objective.updates(replace(part, first=False))
        ]

    judged, generated = logs(batch)
    changed = replace(batch, target=torch.cat([batch.target[:2], -batch.target[2:]]))
    assert logs(changed)[0] == judged and logs(changed)[1] != generated
    changed = replace(batch, target=torch.cat([-batch.target[:2], batch.target[2:]]))
    assert logs(changed)[0] != judged and logs(changed)[1] == generated


def test_without_a_judge_every_sample_trains_the_generator() -> None:
    objective = make(adversarial=0.0)
    assert set(objective.groups) == {"generator"} and not objective.buffers
    (update,) = objective.updates(sample(1))
    (term,) = update.terms
    assert float(term.logs["cross"]) == pytest.approx(numbers(objective.align(sample(1)))["cross"], rel=1e-6)


def test_a_batch_of_one_leaves_nothing_for_the_judge() -> None:
    with pytest.raises(ConfigError, match="batch of 2 or more, or objective.aligned.adversarial=0"):
        list(make().updates(sample(1)))


def test_the_judges_norms_move_with_the_first_micro_batch_alone() -> None:
    objective = make()

    def run(first: bool) -> bool:
        before = {name: value.clone() for name, value in objective.buffers.items()}
        for update in objective.updates(sample(2, first=first)):
            list(update.terms)
        return any(not torch.equal(before[name], value) for name, value in objective.buffers.items())

    assert objective.buffers and run(True) and not run(False)


def test_the_weights_are_those_of_the_settings() -> None:
    names = ("rigid", "cross", "intra", "commutation", "own")
    shares = {name: 0.5 + i for i, name in enumerate(names)}
    objective = make(adversarial=0.0, forward_rigidity=7.0, inverse_rigidity=9.0, max_shift=0.0, **shares)
    ((term,),) = [u.terms for u in objective.updates(sample())]
    found = {name: float(value) for name, value in term.logs.items()}
    rigid = {"forward": 3.5, "inverse": 4.5}
    wanted = sum(shares[name] * found[name] for name in names) + found["rotation"] + found["shift"]
    wanted += sum(
        share * found[f"rigidity_{part}_{way}"] for way, share in rigid.items() for part in ("cross", "total")
    )
    assert term.loss.item() == pytest.approx(wanted, rel=1e-5) and found["shift"] > 0


# Start, masks, draws


def test_fresh_registration_moves_nothing() -> None:
    found = make(moved=False).align(sample())
    assert isinstance(found.total, Field) and found.total.displacement.abs().max() < 1e-5
    losses = numbers(found)
    assert losses["rigid"] == pytest.approx(losses["cross"], rel=1e-5)
    assert all(losses[name] < 1e-9 for name in losses if name.startswith("rigidity"))


def test_invalid_pixels_neither_count_nor_show() -> None:
    objective, batch = make(moved=False), sample(masks=True)
    assert batch.source_mask is not None

    rubbish = torch.where(batch.source_mask > 0, batch.source, 9.0)
    found = numbers(objective.align(batch))
    assert numbers(objective.align(replace(batch, source=rubbish))) == found
    # The mean over valid pixels; over all of them it is smaller by their share.
    published = make(moved=False, published_mean=True)
    share = numbers(published.align(batch))["rigid"] / found["rigid"]
    assert share == pytest.approx(float(batch.source_mask.mean()), rel=1e-5)


def test_turns_belong_to_the_samples_numbers() -> None:
    objective, batch = make(moved=False, rotate_deg=15.0), sample(4)
    shown = objective.align(batch).shown[0]
    part = replace(batch, source=batch.source[2:], target=batch.target[2:], numbers=batch.numbers[2:])
    assert torch.equal(objective.align(part).shown[0], shown[2:])
    assert not torch.equal(objective.align(replace(part, seed=4)).shown[0], shown[2:])


def test_a_pointwise_translator_commutes_and_one_that_moves_does_not() -> None:
    def loss(translate: object) -> float:
        objective = make(adversarial=0.0, rotate_deg=0.0)
        objective._translate = translate  # type: ignore[assignment]
        return numbers(objective.align(sample()))["commutation"]

    assert loss(torch.tanh) < 1e-5
    assert loss(lambda x: x.roll(3, -1)) > 0.05


# Commutation with the dihedral group (D3)


def blur(x: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 8
    return F.conv2d(x.flatten(0, 1)[:, None], kernel.to(x)[None, None], padding=1).view_as(x)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_what_commutes_with_the_dihedral_group(elements: list[int]) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((len(elements), 3, 16, 16)))
    assert commutation_error(torch.tanh, noise, elements) == 0
    assert commutation_error(blur, noise, elements) < 1e-15
    moved = commutation_error(lambda x: x.roll(1, -1), noise, elements)
    # A mirror image in the axis of the movement alone commutes with it: turned by 180 degrees and mirrored.
    still = {0, 6}
    assert (moved > 0.3) == (not set(elements) <= still)


def test_the_eight_elements_are_different() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    assert len({tuple(dihedral(image, [g]).flatten().tolist()) for g in range(8)}) == 8
    both = dihedral(torch.cat([image, image]), [0, 5])
    assert torch.equal(both[0], image[0]) and not torch.equal(both[1], image[0])


@pytest.mark.slow
def test_commutation_joins_the_generators_first_update(tiny_bundle: object) -> None:
    """Diffusion-FFPE's network as well, with gradients that add up."""
    network = TurboNetwork(load_bundle(tiny_bundle), trainable="lora")  # type: ignore[arg-type]
    inner = PairedObjective(network, PairedConfig(), None)
    objective = WithCommutation(inner, lambda x: network(x, "a2b"), EquivarianceConfig(weight=2.0))
    assert objective.groups["generator"].keys() == inner.groups["generator"].keys()
    assert objective.buffers == inner.buffers
    batch = replace(sample(1), source=torch.rand(1, 3, 32, 32), target=torch.rand(1, 3, 32, 32))
    (update,) = objective.updates(batch)
    *_, term = update.terms
    assert float(term.loss.detach()) == pytest.approx(2.0 * float(term.logs["commutation"])) and term.loss > 0
    term.loss.backward()
    assert any(p.grad is not None for p in objective.groups["generator"].values())


def test_commutation_waits_for_the_generator_and_leaves_without_a_weight() -> None:
    inner = make()
    with_term = WithCommutation(inner, torch.tanh, EquivarianceConfig(weight=1.0))
    assert [len(list(u.terms)) for u in with_term.updates(sample(4))] == [2, 2]
    without = WithCommutation(inner, torch.tanh, EquivarianceConfig())
    assert [len(list(u.terms)) for u in without.updates(sample(4))] == [2, 1]
