"""The objective of pix2pix: hand values, who gets gradients when, and that dropout belongs to the sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.training.objective import Sample, Update, keyed_dropout
from wsi_pipeline.training.pix2pix import Pix2PixConfig, Pix2PixObjective

pytestmark = pytest.mark.usefixtures("one_thread")


class Gain(nn.Module):
    """Multiplies its input; the network of these tests."""

    def __init__(self, gain: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.gain, self.dropout = nn.Parameter(torch.tensor(gain)), nn.Dropout(dropout)
        self.learning = {"gain": self.gain}
        self.calls = 0

    def forward(self, image: Tensor, direction: str) -> Tensor:
        assert direction == "a2b"
        self.calls += 1
        made: Tensor = self.dropout(self.gain * image)
        return made


class Judge(nn.Module):
    """A logit of a pair: weight times the sum of the image (not the source), for every image."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("moving", torch.zeros(1))

    def forward(self, pair: Tensor) -> Tensor:
        made: Tensor = self.weight * pair[:, 1:].sum(dim=(1, 2, 3))
        return made


def sample(number: int = 4) -> Sample:
    source = torch.tensor([[[[0.1, -0.2], [0.3, 0.4]]]])
    return Sample(source=source, target=source.flip(-1) + 0.25, numbers=np.array([number]), seed=2)


def run(objective: Pix2PixObjective, at: Sample) -> list[tuple[Update, Tensor, dict[str, float]]]:
    done = []
    for update in objective.updates(at):
        (term,) = list(update.terms)
        term.loss.backward()
        done.append((update, term.loss.detach(), {key: float(value) for key, value in term.logs.items()}))
    return done


@pytest.mark.parametrize("gan_mode", ["vanilla", "lsgan"])
def test_losses_of_two_by_two_pixels_by_hand(gan_mode: Any) -> None:
    objective = Pix2PixObjective(Gain(2.0), Judge(0.5), Pix2PixConfig(l1=10.0, gan_mode=gan_mode))
    (judged, loss_d, logs_d), (made, loss_g, logs_g) = run(objective, sample())
    assert (judged.group, judged.name, made.group, made.name) == (
        "discriminator",
        "judge",
        "generator",
        "pix2pix",
    )
    # a sums to 0.6: the fake's logit is 0.5 * 2 * 0.6, the partner's 0.5 * (0.6 + 4 * 0.25).
    fake, real = 0.6, 0.8
    # 2a = .2 -.4 .6 .8; b = .05 .35 .65 .55
    l1 = (0.15 + 0.75 + 0.05 + 0.25) / 4
    if gan_mode == "vanilla":
        on_fake, on_real, fooled = (
            math.log1p(math.exp(fake)),
            math.log1p(math.exp(-real)),
            math.log1p(math.exp(-fake)),
        )
    else:
        on_fake, on_real, fooled = fake**2, (1 - real) ** 2, (1 - fake) ** 2
    assert float(loss_d) == pytest.approx(0.5 * (on_fake + on_real), rel=1e-6)
    assert float(loss_g) == pytest.approx(fooled + 10 * l1, rel=1e-6)
    assert logs_d == pytest.approx({"disc_fake": on_fake, "disc_real": on_real}, rel=1e-6)
    assert logs_g == pytest.approx({"gan": fooled, "l1_a": l1, "change_a": 0.25}, rel=1e-6)


def test_each_update_moves_its_own_group_and_the_network_runs_once() -> None:
    network, judge = Gain(2.0), Judge(0.5)
    objective = Pix2PixObjective(network, judge, Pix2PixConfig())
    updates = objective.updates(sample())
    (term,) = next(updates).terms
    term.loss.backward()
    assert network.gain.grad is None and judge.weight.grad is not None
    judge.weight.grad = None
    with torch.no_grad():
        judge.weight.fill_(-1.0)  # the generator is judged by the judge as it is after its step
    (term,) = next(updates).terms
    term.loss.backward()
    assert float(term.logs["gan"]) == pytest.approx(math.log1p(math.exp(1.2)), rel=1e-6)
    assert network.gain.grad is not None and judge.weight.grad is None
    assert next(updates, None) is None and judge.weight.requires_grad and network.calls == 1
    assert set(objective.groups) == {"generator", "discriminator"}
    assert list(objective.groups["discriminator"]) == ["net_disc.weight"]
    assert list(objective.buffers) == ["net_disc.moving"]


def test_dropout_belongs_to_the_sample_and_leaves_other_draws_alone() -> None:
    def made(number: int) -> Tensor:
        network = Gain(1.0, dropout=0.5).train()
        kept: list[Tensor] = []
        network.register_forward_hook(lambda _module, _taken, given: kept.append(given.detach()))
        run(Pix2PixObjective(network, Judge(0.5), Pix2PixConfig()), sample(number))
        return kept[0]

    torch.manual_seed(0)
    first = made(4)
    torch.rand(3)
    assert torch.equal(first, made(4))
    assert any(not torch.equal(first, made(number)) for number in range(5, 12))
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    with keyed_dropout(sample()):
        torch.rand(9)
    assert torch.equal(torch.rand(2), wanted)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="l1"):
        Pix2PixConfig(l1=-1.0)
