"""Warps, rigidity, networks and one training step against the published deformation-equivariant training.

Left out on purpose: ``tiles.*`` (tiled inference over a whole array in memory; the stitcher of this package
replaces it), the rigidity with a map of coefficients, and the translation of the affine maps whose published
flip centre ignores the voxel size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_other import Arrays, arrays, close, facts, prefixes, weights
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_pipeline.models.plain_unet import PlainUNet
from wsi_pipeline.models.registration import (
    PairJudge,
    RegistrationConfig,
    RigidEncoder,
    make_judge,
    make_registration,
)
from wsi_pipeline.models.warp import (
    Field,
    Masked,
    RigidityConfig,
    Transform,
    affine_matrix,
    compose,
    exponential,
    jacobian,
    rigidity,
    warp,
)
from wsi_pipeline.training.aligned import AlignedConfig, AlignedObjective
from wsi_pipeline.training.objective import Sample

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS, WARPS, MATRICES, RELATIVE = 1e-5, 2e-6, 1e-5, 1e-5
SALT = "other-dev/equivariant/"


def cases(folder: Path) -> Arrays:
    return arrays(folder, "equivariant_cases")


def tensor(recorded: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.array(recorded[name]))


def same_mask(found: Tensor, wanted: np.ndarray, what: str) -> None:
    assert found.shape == wanted.shape, what
    assert (found.numpy() != wanted).mean() <= 1e-3, what


def displacement(transform: Transform, like: Tensor) -> Tensor:
    """Of any transform: a field of zeros after it samples it on the grid."""
    nothing = Field(displacement=torch.zeros(len(like), like.dim() - 2, *like.shape[2:]))
    found = transform if isinstance(transform, Field) else compose(transform, nothing)
    assert isinstance(found, Field)
    return found.displacement


# Fields


def test_exponentials_and_compositions_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    for case in prefixes(recorded, "field.", ".svf"):
        svf = tensor(recorded, f"{case}.svf")
        forward, inverse = (Field(displacement=exponential(v)) for v in (svf, -svf))
        close(forward.displacement, recorded[f"{case}.exp"], FIELDS, case)
        close(inverse.displacement, recorded[f"{case}.exp_of_minus"], FIELDS, case)
        for steps in (1, 4):
            close(exponential(svf, steps), recorded[f"{case}.exp_steps{steps}"], FIELDS, case)
        there = compose(forward, inverse)
        back = compose(inverse, forward)
        assert isinstance(there, Field) and isinstance(back, Field) and back.mask is not None
        close(there.displacement, recorded[f"{case}.forward_first_then_inverse"], FIELDS, case)
        close(back.displacement, recorded[f"{case}.inverse_first_then_forward"], FIELDS, case)
        same_mask(back.mask, recorded[f"{case}.inverse_first_then_forward.fov_mask"], case)


def test_warps_and_masks_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    for case in prefixes(recorded, "field.", ".svf"):
        source = Masked(tensor(recorded, f"{case}.image"), tensor(recorded, f"{case}.mask"))
        found = warp(source, Field(displacement=tensor(recorded, f"{case}.exp")))
        close(found.image, recorded[f"{case}.warped_image"], WARPS, case)
        same_mask(found.mask, recorded[f"{case}.warped_mask"], case)


def test_rigidity_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    differences = {
        "forward": {},
        "second_central": {"second_central": True},
        "both_central": {"first_central": True, "second_central": True},
    }
    terms: dict[str, dict[str, float]] = {
        term: {"affinity": 0.0, "orthonormality": 0.0, "properness": 0.0, term: 1.0}
        for term in ("affinity", "orthonormality", "properness")
    }
    for case in prefixes(recorded, "field.", ".svf"):
        field = tensor(recorded, f"{case}.exp")
        for name, kind in differences.items():
            for term, share in {**terms, "staining": {}}.items():
                wanted = float(recorded[f"{case}.rigidity.{term}.{name}"])
                found = rigidity(field, RigidityConfig(**share, **kind))
                assert float(found) == pytest.approx(wanted, rel=RELATIVE), (case, term, name)
        for key in recorded:
            if key.startswith(f"{case}.rigidity.voxel_size_"):
                size = [float(s) for s in key.rpartition("voxel_size_")[2].split("_")][: field.shape[1]]
                found = rigidity(field, RigidityConfig(), size)
                assert float(found) == pytest.approx(float(recorded[key]), rel=RELATIVE), key


def test_jacobians_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    for case in prefixes(recorded, "field.", ".svf"):
        field = tensor(recorded, f"{case}.exp")
        for name, central in (("central", True), ("forward_differences", False)):
            matrix = jacobian(field, central).movedim((1, 2), (-2, -1)) + torch.eye(field.shape[1])
            close(torch.linalg.det(matrix), recorded[f"{case}.jacobian_det_{name}"], FIELDS, case)


# Affine maps


def test_random_affine_maps_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    for case in prefixes(recorded, "affine.", ".matrix"):
        size = len(recorded[f"{case}.shape"])
        voxel = recorded.get(f"{case}.setting.voxel_size", np.ones(size))
        draw = {k: tensor(recorded, k) for k in recorded if k.startswith(f"{case}.draw.")}
        draw = {k.rpartition(".")[2]: v.double() for k, v in draw.items()}
        low, high = tensor(recorded, f"{case}.setting.degree_ranges").double().deg2rad().unbind(1)
        left, right = tensor(recorded, f"{case}.setting.translation_ranges").double().unbind(1)
        turns, flips = draw.get("quarter_turns"), draw.get("flips_0_or_1")
        found = affine_matrix(
            # The published loader gives the draws to the axes in reverse order.
            (low + draw["rotation_uniform"] * (high - low)).flip(1),
            left + draw["translation_uniform"] * (right - left),
            torch.from_numpy((recorded[f"{case}.shape"] - 1) / 2 * voxel),
            turns=None if turns is None else turns.flip(1),
            flips=None if flips is None else 2 * flips - 1,
            log_scales=draw["log_scales"] * tensor(recorded, f"{case}.setting.log_scale_scales"),
            log_shears=draw["log_shears"] * tensor(recorded, f"{case}.setting.log_shear_scales"),
        )
        wanted = recorded[f"{case}.matrix"]
        if np.any(voxel != 1):
            found, wanted = found[:, :size, :size], wanted[:, :size, :size]
        close(found, wanted, MATRICES, case)
        if f"{case}.displacement" in recorded:
            wanted = recorded[f"{case}.displacement"]
            close(displacement(found.float(), torch.from_numpy(wanted)), wanted, 1e-4, case)
            close(torch.linalg.inv(found), recorded[f"{case}.inverse_matrix"], 1e-4, case)


def test_rigid_matrices_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    for case in prefixes(recorded, "rigid_matrix.", ".angles"):
        angles, shifts = tensor(recorded, f"{case}.angles"), tensor(recorded, f"{case}.translations")
        centre = tensor(recorded, f"{case}.origin")[0]
        close(affine_matrix(angles, shifts, centre), recorded[f"{case}.forward"], MATRICES, case)
        # Published, and in 3-D no inverse: the angles negated, the order of their axes kept.
        back = affine_matrix(-angles, 0 * shifts, centre) @ affine_matrix(0 * angles, -shifts, centre)
        close(back, recorded[f"{case}.inverse"], MATRICES, case)
        if angles.shape[1] == 3 and "rotation_matrix_3d_of_data_loader" in recorded:
            turned = affine_matrix(angles.flip(1), 0 * shifts, centre)[:, :3, :3]
            close(turned, recorded["rotation_matrix_3d_of_data_loader"], MATRICES, case)


def test_compositions_with_affine_maps_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    fields = sorted(prefixes(recorded, "field.2d.peak", ".svf"), key=lambda c: float(c.partition("peak")[2]))
    source = Masked(tensor(recorded, f"{fields[-1]}.image"), tensor(recorded, f"{fields[-1]}.mask"))
    for case in prefixes(recorded, "compose.", ".image"):
        parts: list[Transform] = []
        for word in re.split("_first_then_|_then_", case.removeprefix("compose.").removesuffix("_only")):
            if word == "affine":
                parts.append(tensor(recorded, "compose.affine"))
            else:
                field = fields[-1] if word == "field" else f"field.2d.{word}"
                parts.append(Field(displacement=tensor(recorded, f"{field}.exp")))
        found = compose(*parts)
        if isinstance(found, Field):
            close(found.displacement, recorded[f"{case}.displacement"], FIELDS, case)
            assert (found.mask is not None) == bool(recorded[f"{case}.mask_present"]), case
            if found.mask is not None:
                same_mask(found.mask, recorded[f"{case}.mask"], case)
        image = warp(source, found)
        close(image.image, recorded[f"{case}.image"], WARPS, case)
        same_mask(image.mask, recorded[f"{case}.image_mask"], case)


# Networks


def load(folder: Path, name: str, network: nn.Module) -> nn.Module:
    shapes = facts(folder, "equivariant")["nets"][name]
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == shapes
    renamed = {key: key.replace("parametrizations.weight.original", "weight") for key in shapes}
    values = weights(folder, {renamed[k]: v for k, v in shapes.items()}, SALT, prefix=f"nets.{name}.")
    network.load_state_dict({key: values[renamed[key]] for key in shapes})
    return network


def test_u_nets_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    translator = load(other_set, "translator", PlainUNet(3, 3, (8, 16, 24), 4))
    close(translator(tensor(recorded, "nets.x")), recorded["nets.translator.out"], 5e-5)
    velocity = load(other_set, "svf3d", PlainUNet(2, 3, (4, 6), slope=0.0, dims=3))
    close(velocity(tensor(recorded, "nets.svf3d.x")), recorded["nets.svf3d.out"], 5e-5)


def test_the_rigid_encoder_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    network = load(other_set, "rigid", RigidEncoder(8, (6, 8, 8)))
    place = tensor(recorded, "nets.coordinates").expand(2, -1, -1, -1)
    found = network(torch.cat([tensor(recorded, "nets.rigid.volume"), place], dim=1))
    close(found, recorded["nets.rigid.out"], 5e-5)


def test_the_judge_and_its_power_iterations_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    judge = load(other_set, "discriminator", PairJudge(6, (5, 8, 8), stem_padding=1)).train()
    states = {when: f"nets.discriminator.{when}." for when in ("before", "after")}
    before = {k.removeprefix(states["before"]): k for k in recorded if k.startswith(states["before"])}
    judge.load_state_dict({name: tensor(recorded, key) for name, key in before.items()}, strict=False)
    x = tensor(recorded, "nets.x")
    for name in ("train_call1", "train_call2"):
        close(judge(x, 0.5 * x.flip(1)), recorded[f"nets.discriminator.{name}"], 5e-5, name)
    for name, value in judge.named_buffers():
        close(value, recorded[states["after"] + name], 1e-5, name)
    close(judge.eval()(x, 0.5 * x.flip(1)), recorded["nets.discriminator.eval_after"], 5e-5)


@pytest.mark.parametrize(
    ("part", "network"),
    [
        ("i2i_unet", lambda: PlainUNet(3, 3, (64, 128, 256, 512, 1024), 16)),
        ("rigid_registration_encoder", lambda: make_registration(RegistrationConfig(), 0)["rigid"]),
        ("cross_modality_registration_unet", lambda: make_registration(RegistrationConfig(), 0)["cross"]),
        ("intra_modality_registration_unet", lambda: make_registration(RegistrationConfig(), 0)["intra"]),
        ("", lambda: make_judge(RegistrationConfig(), 0)),
    ],
)
def test_full_sizes_have_the_published_names_and_shapes_parity(
    part: str, network: Callable[[], nn.Module], other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("normal_", "uniform_", "kaiming_uniform_", "zeros_"):
        monkeypatch.setattr(f"torch.nn.init.{name}", lambda *_, **__: None)  # sizes are all that is asked
    models = facts(other_set, "keys_full")["models"]
    family = "equivariant_staining_four_networks" if part else "equivariant_staining_discriminator"
    wanted = {
        key.removeprefix(f"{part}."): shape
        for key, shape in models[family].items()
        if not part or key.startswith(f"{part}.")
    }
    found = network().state_dict()
    assert {key: list(value.shape) for key, value in found.items()} == wanted


# One training step


class Rigid(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3)), self.weight, self.bias)


class Velocity(nn.Module):
    def __init__(self, weight: Tensor, field: Tensor) -> None:
        super().__init__()
        self.weight, self.field = nn.Parameter(weight), nn.Parameter(field)

    def forward(self, x: Tensor) -> Tensor:
        return self.field + F.conv2d(x, self.weight, padding=1)


class Judge(nn.Module):
    def __init__(self, mix: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(p) for p in (mix, bias, out, out_bias))

    def forward(self, source: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([source, image], dim=1)
        x = F.leaky_relu(torch.einsum("oc,bchw->bohw", self.w1, x) + self.b1[:, None, None], 0.2)
        return F.linear(x.mean((2, 3)), self.w2, self.b2)[:, 0]


def step(folder: Path, run: str) -> tuple[AlignedObjective, Sample, dict[str, nn.Parameter]]:
    """The published configuration of a run with the recorded stand-ins; parameters by the fixture's names."""
    recorded, given = cases(folder), facts(folder, "equivariant")[f"loss_config.{run}"]

    def param(name: str) -> Tensor:
        return tensor(recorded, f"step.param.{name}")

    translator = nn.Conv2d(3, 3, 3, padding=1)
    translator.load_state_dict({k: param(f"translator.{k}") for k in ("weight", "bias")})
    parts: dict[str, nn.Module] = {
        "rigid": Rigid(param("rigid.weight"), param("rigid.bias")),
        "cross": Velocity(param("cross.weight"), param("cross.field")),
        "intra": Velocity(param("intra.weight"), param("intra.field")),
    }
    names = [f"discriminator.{layer}.{kind}" for layer in ("mix", "out") for kind in ("weight", "bias")]
    judge = Judge(*(param(name) for name in names))
    penalties = given["deformation"]
    assert set(penalties["voxel_size"]) == {1.0}
    config = AlignedConfig(
        similarity={"mae": "l1", "mse": "l2"}[given["similarity_loss"]],
        rigid=given["rigid_similarity_weight"],
        cross=given["cross_modality_similarity_weight"],
        intra=given["intra_modality_similarity_weight"],
        commutation=given["di_weight"],
        own=given.get("self_di_weight", 0.0),
        forward_rigidity=given["forward_rigidity_weight"],
        inverse_rigidity=given["inverse_rigidity_weight"],
        adversarial=given["discriminator_weight"],
        max_rotation=given["max_rotation"],
        max_shift=given["max_translation"],
        implicit=given["use_implicit_di"],
        common_frame=given.get("use_eqadv", True),
        published_mean=True,
        penalties=RigidityConfig(
            affinity=penalties["affinity_weight"],
            orthonormality=penalties["orthonormality_weight"],
            properness=penalties["properness_weight"],
            first_central=penalties["first_derivatives_central"],
            second_central=penalties["second_derivatives_central"],
        ),
    )
    turns = tensor(recorded, "step.random_transformation")
    sample = Sample(
        source=tensor(recorded, "step.input"),
        target=tensor(recorded, "step.label"),
        source_mask=tensor(recorded, "step.input_mask"),
        target_mask=tensor(recorded, "step.label_mask"),
        numbers=np.arange(len(turns)),
        seed=0,
    )
    learning = {f"translator.{name}": p for name, p in translator.named_parameters()}
    objective = AlignedObjective(
        translator, learning, nn.ModuleDict(parts), judge, config, lambda part: turns[part.numbers]
    )
    moving = {f"{part}.{name}": p for part, net in parts.items() for name, p in net.named_parameters()}
    return objective, sample, {**learning, **moving, **dict(judge.named_parameters())}


def runs(folder: Path) -> list[str]:
    return [key.split(".")[1] for key in prefixes(cases(folder), "step.", ".loss.rigid")]


def test_the_losses_and_gradients_of_a_step_parity(other_set: Path) -> None:
    recorded, about = cases(other_set), facts(other_set, "equivariant")
    for run in runs(other_set):
        objective, sample, parameters = step(other_set, run)
        groups = {
            "discriminator": about["discriminator_param_names"],
            "generator": about["generator_param_names"],
        }
        found: dict[str, float] = {}
        for update in objective.updates(sample):
            for term in update.terms:
                term.loss.backward()
                found |= {name: float(value) for name, value in term.logs.items()}
            for name in groups[update.group]:
                wanted = recorded[f"step.{run}.step_grad.{update.group}.{name}"]
                gradient = parameters[name].grad
                assert gradient is not None, (run, name)
                close(gradient, wanted, 2e-4 * float(np.abs(wanted).max()), f"{run} {name}")
                parameters[name].grad = None
            assert all(p.grad is None for p in parameters.values()), "the judge or the generator as well"
        share = about[f"loss_config.{run}"]["discriminator_weight"]
        names = {"commutation": "com", "own": "self", "adversarial": "adv"}
        names |= {"rotation": "rotation_constraint", "shift": "translation_constraint"}
        found["d_real"], found["d_fake"] = (found.pop(f"disc_{kind}") / share for kind in ("real", "fake"))
        found.pop("change")
        found = {names.get(name, name): value for name, value in found.items()}
        wanted = {k.rpartition(".")[2]: float(v) for k, v in recorded.items() if f"{run}.loss." in k}
        assert found == pytest.approx(wanted, rel=RELATIVE), run


def test_which_parameters_each_loss_moves_parity(other_set: Path) -> None:
    recorded, about = cases(other_set), facts(other_set, "equivariant")
    names = {"com": "commutation", "self": "own"}
    names |= {"rotation_constraint": "rotation", "translation_constraint": "shift"}
    for run in runs(other_set):
        objective, sample, parameters = step(other_set, run)
        losses = objective.align(second_half(sample)).losses
        learning = [parameters[name] for name in about["generator_param_names"]]
        for name in (key for key in recorded if key.startswith(f"step.{run}.grad_norm.")):
            loss = name.rpartition(".")[2]
            if loss == "adv":  # its gradient is part of the step's
                continue
            gradients = torch.autograd.grad(
                losses[names.get(loss, loss)], learning, allow_unused=True, retain_graph=True
            )
            wanted = recorded[name]
            assert [g is None for g in gradients] == np.isnan(wanted).tolist(), (run, loss)
            norms = torch.stack([torch.zeros(()) if g is None else g.norm() for g in gradients])
            close(norms, np.nan_to_num(wanted), 1e-4 * float(np.nanmax(wanted)) + 1e-12, f"{run} {loss}")


def second_half(sample: Sample) -> Sample:
    rows = slice(len(sample.source) // 2, None)
    assert sample.source_mask is not None and sample.target_mask is not None
    return replace(
        sample,
        source=sample.source[rows],
        target=sample.target[rows],
        source_mask=sample.source_mask[rows],
        target_mask=sample.target_mask[rows],
        numbers=sample.numbers[rows],
    )


def test_the_images_and_fields_of_a_step_parity(other_set: Path) -> None:
    recorded = cases(other_set)
    for run in runs(other_set):
        objective, sample, _ = step(other_set, run)
        with torch.no_grad():
            found = objective.align(second_half(sample))
        half = f"step.{run}.generator_half"
        if f"{half}.output" not in recorded:
            continue
        close(found.made, recorded[f"{half}.output"], 2e-4, run)
        assert isinstance(found.total, Field) and found.total.mask is not None
        close(found.total.displacement, recorded[f"{half}.forward_deformation"], 2e-4, run)
        same_mask(found.total.mask, recorded[f"{half}.forward_deformation.mask"], run)
        source, real, made = found.shown
        close(source, recorded[f"{half}.random_deformed_input"], 2e-4, run)
        pair = ("random_cross_modality_deformed_label", "random_commutation_deformed_output")
        mask = np.prod([recorded[f"{half}.{name}.mask"] for name in pair], axis=0)
        for image, name in zip((real, made), pair, strict=True):
            close(image, recorded[f"{half}.{name}"] * mask, 2e-4, f"{run} {name}")
