"""One iteration: rates, clipping, averages of weights and of gradients, numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from wsi_pipeline.errors import TrainingError
from wsi_pipeline.training.config import OptimiserConfig
from wsi_pipeline.training.ema import swapped
from wsi_pipeline.training.loop import (
    Averages,
    Iteration,
    average_gradients,
    learning_rate_at,
    make_optimisers,
)
from wsi_pipeline.training.objective import Sample, Term, Update

pytestmark = pytest.mark.usefixtures("one_thread")


class Processes:
    """Stands in for accelerate: this process beside others with tensors of their own."""

    is_main_process = True
    device = torch.device("cpu")

    def __init__(self, *others: Tensor) -> None:
        self.others, self.num_processes = others, 1 + len(others)
        self.reduced: list[int] = []

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "mean"
        self.reduced.append(tensor.numel())
        return torch.stack([tensor, *(other.expand_as(tensor) for other in self.others)]).mean(0)


class Quadratic:
    """Loss: mean of (weight * source - target)^2; the second group, if there is one, moves by a constant."""

    def __init__(self, judged: bool = False, factor: float = 1.0) -> None:
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.unused = nn.Parameter(torch.tensor([5.0]))
        self.other = nn.Parameter(torch.tensor([3.0]))
        self.judged, self.factor = judged, factor

    @property
    def groups(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        groups = {"generator": {"weight": self.weight, "unused": self.unused}}
        return groups | ({"discriminator": {"other": self.other}} if self.judged else {})

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {}

    def updates(self, sample: Sample) -> Iterator[Update]:
        yield Update(group="generator", name="fit", terms=self._fit(sample))
        if self.judged:
            yield Update(group="discriminator", name="judge", terms=[Term(4 * self.other.sum(), {})])

    def _fit(self, sample: Sample) -> Iterator[Term]:
        loss = self.factor * (self.weight * sample.source - sample.target).square().mean()
        yield Term(loss, {"fit": loss.detach()})


def sample(*values: float) -> Sample:
    source = torch.tensor(values)[:, None].expand(-1, 2)
    return Sample(source=source, target=torch.zeros_like(source), numbers=np.arange(len(values)), seed=0)


def iteration(objective: Quadratic, config: OptimiserConfig, processes: Any = None, **rest: Any) -> Iteration:
    return Iteration(
        objective=objective,
        optimisers=make_optimisers(objective, config),
        config=config,
        accelerator=processes or Processes(),
        **({"steps": 10} | rest),
    )


# Rates


@given(
    step=st.integers(0, 120),
    steps=st.integers(1, 100),
    warmup=st.integers(0, 30),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_a_rate_is_between_zero_and_its_peak(step: int, steps: int, warmup: int, schedule: Any) -> None:
    config = OptimiserConfig(learning_rate=2.0, warmup=warmup, schedule=schedule)
    rate = learning_rate_at(step, steps, "generator", config)
    assert 0 <= rate <= 2
    if step < warmup:
        assert rate == pytest.approx(2 * (step + 1) / warmup)
    elif step == warmup:
        assert rate == pytest.approx(2)
    elif step >= steps and schedule != "constant":
        assert rate == pytest.approx(0, abs=1e-9)


def test_schedules_end_where_the_run_ends() -> None:
    """Once for each iteration: the published program's ended at a third of the run."""
    config = OptimiserConfig(learning_rate=1.0, warmup=10)
    half = 10 + (110 - 10) // 2
    wanted = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}
    for schedule, rate in wanted.items():
        changed = replace(config, schedule=schedule)
        assert learning_rate_at(half, 110, "generator", changed) == pytest.approx(rate)
        later = [learning_rate_at(step, 110, "generator", changed) for step in range(10, 111)]
        assert later == sorted(later, reverse=True)
    quarter = learning_rate_at(35, 110, "generator", replace(config, schedule="cosine"))
    assert quarter == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_discriminators_may_have_a_rate_of_their_own() -> None:
    config = OptimiserConfig(learning_rate=1.0, discriminator_learning_rate=0.25)
    assert learning_rate_at(0, 9, "discriminator", config) == 0.25
    assert learning_rate_at(0, 9, "generator", config) == 1.0
    shared = OptimiserConfig(learning_rate=0.5)
    assert learning_rate_at(0, 9, "discriminator", shared) == 0.5


def test_every_step_has_the_rate_of_its_iteration() -> None:
    config = OptimiserConfig(learning_rate=1.0, schedule="linear", discriminator_learning_rate=0.5)
    some = iteration(Quadratic(judged=True), config)
    for step in (0, 5, 9):
        some.run(step, [sample(1.0)])
        rates = {group: o.param_groups[0]["lr"] for group, o in some.optimisers.items()}
        assert rates == {
            "generator": pytest.approx(1 - step / 10),
            "discriminator": pytest.approx(0.5 - step / 20),
        }


# Steps


def test_a_step_is_adamws() -> None:
    config = OptimiserConfig(learning_rate=0.1, weight_decay=0.5)
    objective = Quadratic()
    iteration(objective, config).run(0, [sample(1.0)])
    # The first step of Adam is the sign of the gradient; decay is apart from it (Loshchilov and Hutter).
    wanted = torch.tensor([1.0, 2.0]) * (1 - 0.1 * 0.5) - 0.1
    assert torch.allclose(objective.weight.detach(), wanted, atol=1e-5)
    assert float(objective.unused.detach()) == 5.0, "without a gradient there is no step, and no decay"
    assert objective.weight.grad is None


def test_gradients_are_clipped_by_group_and_their_norm_is_logged() -> None:
    config = OptimiserConfig(clip=0.5)
    some = iteration(Quadratic(judged=True), config)
    kept = {}
    for group, optimiser in some.optimisers.items():
        optimiser.register_step_pre_hook(
            lambda o, *_, group=group: kept.update(
                {
                    group: torch.cat(
                        [p.grad.clone() for p in o.param_groups[0]["params"] if p.grad is not None]
                    )
                }
            )
        )
    logs = some.run(0, [sample(1.0)])
    assert float(logs["norm_fit"]) == pytest.approx(5**0.5, rel=1e-5), "before clipping"
    assert float(logs["norm_judge"]) == pytest.approx(4.0)
    for gradient in kept.values():
        assert float(gradient.norm()) == pytest.approx(0.5, rel=1e-4)


def test_logs_are_means_over_micro_batches() -> None:
    losses = [float(iteration(Quadratic(), OptimiserConfig()).run(0, [sample(x)])["fit"]) for x in (1.0, 3.0)]
    both = iteration(Quadratic(), OptimiserConfig()).run(0, [sample(1.0), sample(3.0)])
    assert float(both["fit"]) == pytest.approx(sum(losses) / 2)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e38])
def test_gradients_that_are_no_numbers_stop_training(factor: float) -> None:
    objective = Quadratic(factor=factor)
    with pytest.raises(TrainingError, match="iteration 8: the gradients of update 'fit' are not finite"):
        iteration(objective, OptimiserConfig()).run(7, [sample(10.0)])
    assert objective.weight.tolist() == [1.0, 2.0], "nothing was stepped"


# Averaged weights


def test_averages_follow_the_weights() -> None:
    objective, average = Quadratic(), {"weight": torch.zeros(2), "unused": torch.tensor([5.0])}
    some = iteration(objective, OptimiserConfig(ema=0.75, learning_rate=0.1), ema=average)
    wanted = torch.zeros(2)
    for step in range(3):
        some.run(step, [sample(1.0)])
        wanted = 0.75 * wanted + 0.25 * objective.weight.detach()
    assert torch.allclose(average["weight"], wanted)
    assert float(average["unused"]) == 5.0


def test_averages_are_lent_and_given_back_even_after_an_error() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(KeyError), swapped({"weight": weight}, {"weight": torch.tensor([9.0])}):
        assert float(weight.detach()) == 9.0
        raise KeyError
    assert float(weight.detach()) == 1.0
    with swapped({"weight": weight}, {}):
        assert float(weight.detach()) == 1.0


# Processes


def test_gradients_become_means_over_processes_in_one_message() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,))]
    for value, parameter in enumerate(parameters[:2]):
        parameter.grad = torch.full_like(parameter, value + 1.0)
    processes = Processes(torch.tensor(4.0))
    average_gradients(parameters, processes)
    assert processes.reduced == [10]
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 2.5))
    assert torch.equal(parameters[1].grad, torch.full((4,), 3.0))
    assert parameters[2].grad is None


def test_one_process_sends_nothing() -> None:
    parameter, processes = nn.Parameter(torch.zeros(2)), Processes()
    parameter.grad = torch.ones(2)
    average_gradients([parameter], processes)
    assert processes.reduced == []
    assert torch.equal(parameter.grad, torch.ones(2))


def test_clipping_comes_after_the_mean() -> None:
    """The norm is that of the whole batch: every process clips alike."""
    some = iteration(Quadratic(), OptimiserConfig(), Processes(torch.tensor(0.0)))
    assert float(some.run(0, [sample(1.0)])["norm_fit"]) == pytest.approx(5**0.5 / 2, rel=1e-5)


def test_a_process_that_fails_stops_all() -> None:
    some = iteration(Quadratic(), OptimiserConfig(), Processes(torch.tensor(float("nan"))))
    with pytest.raises(TrainingError):
        some.run(0, [sample(1.0)])


def test_logged_values_are_means_since_the_last_time() -> None:
    averages = Averages()
    for value in (1.0, 2.0, 6.0):
        averages.add({"loss": torch.tensor(value)})
    assert averages.take(Processes()) == {"loss": pytest.approx(3.0)}
    averages.add({"loss": torch.tensor(5.0)})
    assert averages.take(Processes(torch.tensor(1.0))) == {"loss": pytest.approx(3.0)}
