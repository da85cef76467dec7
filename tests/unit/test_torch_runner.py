"""What every torch generator shares: devices, dtypes, uint8 in and out, and batches that shrink."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import ConfigError, GeneratorError
from wsi_pipeline.generators import _torch as module
from wsi_pipeline.generators._torch import (
    TileRunner,
    batch_for,
    choose_device,
    choose_dtype,
    from_uint8,
    to_uint8,
)

CPU = torch.device("cpu")


class Fake:
    """Inverts tiles and adds their extras; has room for ``room`` tiles and remembers every call."""

    def __init__(self, room: int = 99) -> None:
        self.room = room
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, pixels: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        self.calls.append(tuple(int(tile[0, 0, 0]) for tile in pixels))
        assert pixels.dtype == torch.uint8
        assert torch.is_inference_mode_enabled()
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        made = 255 - pixels
        return made if extra is None else made + extra[:, None, None, None].to(torch.uint8)


def runner(network: Callable[..., Any], micro_batch: int, device: torch.device = CPU) -> TileRunner:
    return TileRunner(network=network, device=device, micro_batch=micro_batch)


def numbered(count: int) -> np.ndarray:
    """Tile i is all i."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8)


# Micro-batches


@given(count=st.integers(1, 11), micro_batch=st.integers(1, 8), with_extra=st.booleans())
def test_every_tile_once_and_in_order(count: int, micro_batch: int, with_extra: bool) -> None:
    fake, pixels = Fake(), numbered(count)
    extra = np.arange(count, dtype=np.float32) * 10 if with_extra else None
    result = runner(fake, micro_batch)(pixels, extra)
    wanted = 255 - pixels + (0 if extra is None else extra.astype(np.uint8)[:, None, None, None])
    np.testing.assert_array_equal(result, wanted)
    assert {len(call) for call in fake.calls} == {micro_batch}, "the network sees one batch size only"
    assert len(fake.calls) == -(-count // micro_batch)


def test_a_tail_repeats_its_last_tile() -> None:
    fake = Fake()
    runner(fake, 4)(numbered(6))
    assert fake.calls == [(0, 1, 2, 3), (4, 5, 5, 5)]


def test_no_tiles_are_no_calls() -> None:
    fake = Fake()
    assert runner(fake, 4)(numbered(0)).shape == (0, 4, 4, 3)
    assert fake.calls == []


def test_the_input_is_only_read() -> None:
    pixels = numbered(3)
    pixels.setflags(write=False)
    np.testing.assert_array_equal(runner(Fake(), 2)(pixels), 255 - numbered(3))
    np.testing.assert_array_equal(pixels, numbered(3))


# Out of memory


def test_the_batch_shrinks_and_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(room=3)
    run = runner(fake, 8)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(run(numbered(9)), 255 - numbered(9))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"cpu: out of memory, going on with {n} tiles at a time" for n in (4, 2)]
    assert list(dict.fromkeys(len(call) for call in fake.calls)) == [8, 4, 2]
    assert run.micro_batch == 2
    fake.calls.clear()
    run(numbered(4))
    assert [len(call) for call in fake.calls] == [2, 2], "what failed once is not tried again"


def test_memory_that_runs_out_amid_a_call_loses_no_tile() -> None:
    fake = Fake()

    def later(pixels: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        fake.room = 1 if len(fake.calls) == 1 else fake.room
        return fake(pixels, extra)

    np.testing.assert_array_equal(runner(later, 2)(numbered(5)), 255 - numbered(5))
    assert [len(call) for call in fake.calls][-5:] == [1, 1, 1, 1, 1]


def test_no_room_for_a_single_tile() -> None:
    run = runner(Fake(room=0), 4)
    with pytest.raises(
        GeneratorError, match="cpu: out of memory with a single tile of 4 px; .*bfloat16"
    ) as caught:
        run(numbered(2))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_other_errors_of_a_network_are_not_hidden() -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise ValueError("another reason")

    with pytest.raises(ValueError, match="another reason"):
        runner(broken, 4)(numbered(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_tiles_come_back_in_order_and_the_batch_shrinks() -> None:
    fake = Fake(room=3)
    run = runner(fake, 8, torch.device("cuda", 0))
    np.testing.assert_array_equal(run(numbered(11)), 255 - numbered(11))
    assert run.micro_batch == 2


# uint8 in and out


def test_every_grey_level_comes_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = from_uint8(torch.from_numpy(levels))
    assert (x.dtype, x.shape, x.is_contiguous()) == (torch.float32, (1, 3, 16, 16), True)
    wanted = (levels.transpose(0, 3, 1, 2).astype(np.float64) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(x.numpy(), wanted, atol=1e-7)
    np.testing.assert_array_equal(to_uint8(x, "round").numpy(), levels)


@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=50))
def test_rounding_is_numpys(values: list[float]) -> None:
    y = np.array(values, np.float32)
    levels = np.clip(y * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
    tensor = torch.from_numpy(y).reshape(1, 1, 1, -1)
    for rounding, wanted in (("round", np.rint(levels)), ("truncate", np.trunc(levels))):
        result = to_uint8(tensor, rounding)  # type: ignore[arg-type]
        assert (result.dtype, tuple(result.shape)) == (torch.uint8, (1, 1, len(y), 1))
        np.testing.assert_array_equal(result.flatten().numpy(), wanted.astype(np.uint8))


def test_channels_go_last() -> None:
    y = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 2, 5)
    assert to_uint8(y, "truncate")[0, 1, 4].tolist() == [0, 127, 255]
    assert to_uint8(y, "round")[0, 1, 4].tolist() == [0, 128, 255]


# Devices and types


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("name", "gpus", "wanted"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_choosing_a_device(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, wanted: str) -> None:
    with_gpus(monkeypatch, gpus)
    assert choose_device(name) == torch.device(wanted)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, r"device 'cuda': is not there \(CUDA devices: 0\); give auto or cpu"),
        ("cuda:2", 2, r"device 'cuda:2': is not there \(CUDA devices: 2\)"),
        ("tpu", 0, "device 'tpu': is not supported; give auto, cpu, cuda or cuda:N"),
        ("", 0, "device '': is not supported"),
        ("cuda:-1", 1, "device 'cuda:-1': is not supported"),
        ("meta", 0, "device 'meta': is not supported"),
        ("mps", 0, "device 'mps': is not supported"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, message: str
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_a_named_type_is_taken() -> None:
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cuda", 0)) == torch.float16
    with pytest.raises(ConfigError, match="dtype float16: is hopelessly slow on a CPU; give auto"):
        choose_dtype("float16", CPU)


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), torch.float32)],
)
def test_a_gpus_best_type(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: torch.dtype
) -> None:
    with_gpus(monkeypatch, 1, capability)
    assert choose_dtype("auto", torch.device("cuda", 0)) == wanted


@pytest.mark.parametrize(
    ("avx", "amx", "wanted"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_a_cpus_best_type(monkeypatch: pytest.MonkeyPatch, avx: bool, amx: bool, wanted: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", CPU) == wanted


# Batch size

GIB = 2**30


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``batch_for`` on a GPU with so much free memory, not remembered."""

    def call(free: float, weights: float, tile: float, max_vram: float | None = None) -> int:
        batch_for.cache_clear()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * GIB), 999 * GIB))
        size = batch_for(torch.device("cuda", 0), int(weights * GIB), int(tile * GIB), max_vram)
        batch_for.cache_clear()
        return size

    return call


def test_lanes_work_side_by_side_and_halve_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    together = threading.Barrier(2, timeout=10)  # breaks unless two tiles are under way at the same time

    def network(pixels: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        if run.lanes == 2:
            together.wait()
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return 255 - pixels

    run = TileRunner(network=network, device=CPU, lanes=2)
    pixels = np.arange(4 * 3, dtype=np.uint8).reshape(4, 1, 1, 3)
    np.testing.assert_array_equal(run(pixels), 255 - pixels)
    assert run.lanes == 1
    assert "going on with 1 tiles" in caplog.text


def test_a_cpu_takes_one_tile_a_core_if_half_its_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CORES", 6)
    monkeypatch.setattr(module.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 20 * GIB // 4096}.get)
    for weights, tile, wanted in [(1, 1, 6), (4, 2, 3), (4, 5, 1), (12, 1, 1)]:
        assert batch_for(CPU, weights * GIB, tile * GIB, None) == wanted
    batch_for.cache_clear()


@pytest.mark.parametrize(
    ("free", "weights", "tile", "max_vram", "wanted"),
    [
        (24.0, 3.0, 1.0, None, 16),  # 18 fit
        (16.0, 3.0, 1.0, None, 8),  # 11 fit
        (8.0, 3.0, 1.0, None, 4),  # 4.2 fit
        (6.0, 3.0, 1.0, None, 2),  # 2.4 fit
        (4.0, 3.0, 1.0, None, 1),
        (1.0, 3.0, 1.0, None, 1),  # the runner will say that there is no room
        (80.0, 3.0, 1.0, None, module.MOST_TILES),
        (80.0, 3.0, 1.0, 8.0, 4),
        (8.0, 3.0, 1.0, 80.0, 4),
        (80.0, 3.0, 1.0, 0.5, 1),
    ],
)
def test_the_batch_fits_into_free_memory(
    batch: Callable[..., int],
    free: float,
    weights: float,
    tile: float,
    max_vram: float | None,
    wanted: int,
) -> None:
    assert batch(free, weights, tile, max_vram) == wanted


@given(free=st.floats(0.1, 100), weights=st.floats(0.1, 10), tile=st.floats(0.01, 10))
def test_the_batch_is_a_power_of_two_that_fits(free: float, weights: float, tile: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * GIB), 999 * GIB))
        batch_for.cache_clear()
        size = batch_for(torch.device("cuda", 0), int(weights * GIB), int(tile * GIB), None)
        batch_for.cache_clear()
    assert size in (1, 2, 4, 8, 16)
    assert size == 1 or weights + size * tile <= 0.9 * free + 1e-6
    assert size == 16 or weights + 2 * size * tile > 0.9 * free - 1e-6, "twice as many would not fit"
