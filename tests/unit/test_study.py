"""Reader studies: a page that tells nothing, and figures that can be checked by hand."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from wsi_pipeline.cohorts.tiles import load_tiles
from wsi_pipeline.errors import ConfigError, OutputError, OutputExistsError
from wsi_pipeline.study.analyse import analyse, write_table
from wsi_pipeline.study.pack import Pack, pack
from wsi_pipeline.study.statistics import (
    auc,
    equivalence_p,
    kappa,
    share,
    size_for_equivalence,
    size_for_interval,
)


def folder(path: Path, count: int, seed: int, *, side: int = 32, ending: str = "png") -> Path:
    path.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        pixels[: 4 * number] = 128  # files of very different lengths
        Image.fromarray(pixels).save(path / f"{path.name}-{number}.{ending}")
    return path


def make(real: Path, synthetic: Path, out: Path, seed: int | None = 5, count: int | None = None) -> Pack:
    return pack(load_tiles(real), load_tiles(synthetic), out, count=count, seed=seed, quality=90)


@pytest.fixture
def packed(tmp_path: Path) -> Pack:
    return make(folder(tmp_path / "biopsy", 6, 0), folder(tmp_path / "gan", 6, 1), tmp_path / "s.html")


def answers(
    packed: Pack, reader: str, say: Callable[[int, str], tuple[str, int]], *, skip: int = 0, sep: str = ","
) -> Path:
    """A file as the page saves it: ``say(number, truth)`` is what the reader answers."""
    tiles = json.loads(packed.key.read_text())["tiles"]
    lines = [sep.join(("study", "reader", "id", "answer", "confidence", "seconds", "order"))]
    for number, (name, tile) in enumerate(list(tiles.items())[skip:]):
        word, confidence = say(number, tile["truth"])
        cells = (packed.study, reader, name, word, str(confidence), "2.5", str(number + 1))
        lines.append(sep.join(cells))
    path = packed.page.parent / f"{reader}.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_sample_sizes_are_those_of_the_specification() -> None:
    assert size_for_interval(0.1) == 97
    assert size_for_equivalence(0.1, power=0.9) == 215


@pytest.mark.parametrize(("both", "size", "power"), [(False, 215, 0.8), (True, 271, 0.9)])
def test_what_the_sizes_promise_is_what_the_exact_test_does(both: bool, size: int, power: float) -> None:
    assert size_for_equivalence(0.1, power=0.9, both=both) == size
    passing = [hits for hits in range(size + 1) if equivalence_p(hits, size, 0.1) < 0.05]
    assert stats.binom.pmf(passing, size, 0.5).sum() == pytest.approx(power, abs=0.025)
    for edge in (0.4, 0.6):  # a reader who is not at chance passes in no more than 5 %
        assert stats.binom.pmf(passing, size, edge).sum() <= 0.05


def test_exact_intervals() -> None:
    eight = share(8, 10)
    assert (eight.value, eight.low, eight.high) == pytest.approx((0.8, 0.4439, 0.9748), abs=1e-4)
    none = share(0, 10)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert share(10, 10).low == pytest.approx(0.025**0.1)
    assert share(48, 97).high - 48 / 97 == pytest.approx(0.1, abs=0.005)


def test_kappa_of_a_table() -> None:
    first = "s" * 20 + "s" * 5 + "r" * 10 + "r" * 15
    second = "s" * 20 + "r" * 5 + "s" * 10 + "r" * 15
    assert kappa(first, second) == pytest.approx(0.4)  # (0.7 - 0.5) / (1 - 0.5)
    assert kappa("srsr", "srsr") == 1.0
    assert kappa("sr", "rs") == -1.0
    assert kappa("ss", "ss") == kappa("", "") == 0.0


def test_auc_counts_pairs_and_knows_its_error() -> None:
    assert auc([1, 2, 3], [0, 2, 2.5]).value == pytest.approx(5.5 / 9)
    # Hanley and McNeil: 50 + 50 at 0.8 have a standard error of 0.0445.
    synthetic, real = [1.0] * 40 + [-1.0] * 10, [0.0] * 50
    found = auc(synthetic, real)
    assert found.value == 0.8
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.0445, rel=0.03)
    sure = auc([5] * 10, [-5] * 10)
    assert sure.value == sure.high == 1.0
    assert 0.7 < sure.low < 0.95
    wrong = auc([-5] * 10, [5] * 10)
    assert (wrong.low, wrong.high) == pytest.approx((0.0, 1 - sure.low))
    even = auc([1, -1] * 30, [1, -1] * 30)
    assert even.high - 0.5 == pytest.approx(0.5 - even.low)


def test_the_page_is_the_same_whichever_side_is_called_real(packed: Pack, tmp_path: Path) -> None:
    swapped = make(tmp_path / "gan", tmp_path / "biopsy", tmp_path / "swapped.html")
    assert swapped.page.read_bytes() == packed.page.read_bytes()
    tiles, other = (json.loads(made.key.read_text())["tiles"] for made in (packed, swapped))
    assert tiles.keys() == other.keys()
    assert all(tiles[name]["truth"] != other[name]["truth"] for name in tiles)


def test_nothing_in_the_page_tells_tiles_apart(packed: Pack) -> None:
    text = packed.page.read_text()
    for word in ("biopsy", "gan-", ".png", str(packed.page.parent), "Exif", "://"):
        assert word not in text
    assert "synthetic images: not for diagnosis" in text
    data = json.loads(re.search(r'id="study">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert data.keys() == {"id", "height", "width", "tiles"}
    ids = [tile["id"] for tile in data["tiles"]]
    assert ids == sorted(ids)
    assert all(tile.keys() == {"id", "jpeg"} for tile in data["tiles"])
    files = [base64.b64decode(tile["jpeg"]) for tile in data["tiles"]]
    assert len({len(file) for file in files}) == 1
    start_of_scan = {file[: file.index(b"\xff\xda")] for file in files}
    assert len(start_of_scan) == 1  # one set of tables, no other segment
    assert b"\xff\xe1" not in start_of_scan.pop()


def test_the_key_knows_each_tile(packed: Pack, tmp_path: Path) -> None:
    key = json.loads(packed.key.read_text())
    assert packed.images == len(key["tiles"]) == 12
    names = {tile["name"]: tile["truth"] for tile in key["tiles"].values()}
    assert names == {f"biopsy-{n}": "real" for n in range(6)} | {f"gan-{n}": "synthetic" for n in range(6)}
    other = make(tmp_path / "biopsy", tmp_path / "gan", tmp_path / "t.html", seed=None)
    assert not json.loads(other.key.read_text())["tiles"].keys() & key["tiles"].keys()


def test_a_study_is_refused_where_it_would_be_spoilt(packed: Pack, tmp_path: Path) -> None:
    real, gan = tmp_path / "biopsy", tmp_path / "gan"
    with pytest.raises(OutputExistsError):
        make(real, gan, packed.page)
    packed.page.unlink()
    with pytest.raises(OutputExistsError):
        make(real, gan, packed.page)
    with pytest.raises(ConfigError, match="1 to 6"):
        make(real, gan, tmp_path / "n.html", count=7)
    with pytest.raises(ConfigError, match="twice"):
        make(real, real, tmp_path / "n.html")
    with pytest.raises(ConfigError, match="another size"):
        make(real, folder(tmp_path / "large", 6, 2, side=40), tmp_path / "n.html")
    with pytest.raises(OutputError, match="cannot be written"):
        make(real, gan, tmp_path / "absent" / "n.html")
    assert not (tmp_path / "n.html").exists()


def test_what_could_tell_the_sides_apart_is_warned_of(packed: Pack, tmp_path: Path) -> None:
    assert "12 images are few" in packed.warnings[0]
    jpegs = folder(tmp_path / "jpegs", 6, 3, ending="jpg")
    mixed = make(jpegs, tmp_path / "gan", tmp_path / "m.html")
    assert "only the real tiles are of lossy files" in mixed.warnings[0]
    Image.new("RGB", (32, 32)).save(tmp_path / "gan" / "z.tif", compression="jpeg")
    assert not [
        text for text in make(jpegs, tmp_path / "gan", tmp_path / "b.html", count=6, seed=1).warnings[1:]
    ]
    sides = (load_tiles(tmp_path / "biopsy", mpp=0.5), load_tiles(tmp_path / "gan", mpp=0.25))
    coarse = pack(*sides, tmp_path / "c.html", count=2, seed=0, quality=90)
    assert any("pixel sizes differ (0.5 and 0.25)" in text for text in coarse.warnings)


def test_readers_are_judged_each_and_in_pairs(packed: Pack, tmp_path: Path) -> None:
    right = answers(packed, "R1", lambda number, truth: (truth, 5))
    half = answers(packed, "R2", lambda number, truth: ("synthetic", 1 + number % 5), skip=2, sep=";")
    result = analyse(packed.key, [right, half])
    first, second = result.readers
    assert (first.reader, first.missing, first.accuracy.value, first.auc.value) == ("R1", 0, 1.0, 1.0)
    assert not first.equivalent
    assert (second.missing, second.accuracy.n) == (2, 10)
    assert (second.sensitivity.value, second.specificity.value) == (1.0, 0.0)
    assert second.seconds == 2.5
    assert result.kappa == {"R1 R2": 0.0}
    third = answers(packed, "R3", lambda number, truth: (truth if number else "real", 2), skip=1)
    assert analyse(packed.key, [right, third]).kappa["R1 R3"] == pytest.approx(1.0)
    table = tmp_path / "figures.csv"
    write_table(table, result)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["reader"] for row in rows] == ["R1", "R2"]
    assert float(rows[1]["accuracy_value"]) == second.accuracy.value
    with pytest.raises(OutputError):
        write_table(table, result)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("R1,", "Dr Smith,"), "no code"),
        (lambda text: re.sub(r",R1,\w{4}", ",R1,0000", text, count=1), "not in the key"),
        (lambda text: text.replace("real,5", "real,6", 1), "no answer"),
        (lambda text: text.replace("real,5", "benign,5", 1), "no answer"),
        (lambda text: text.replace("5,2.5", "5,long", 1), "long s is no answer"),
        (lambda text: "\n".join(text.splitlines()[:3]), "one kind only"),
        (lambda text: text + text.splitlines()[-1] + "\n", "line 14: R1 has judged"),
        (lambda text: "a,b\n1,2\n", "columns"),
        (lambda text: text.splitlines()[0], "holds no answers"),
        (lambda text: "", "holds no answers"),
    ],
)
def test_answers_that_cannot_be_are_refused(packed: Pack, change: Callable[[str], str], problem: str) -> None:
    path = answers(packed, "R1", lambda number, truth: (truth, 5))
    assert analyse(packed.key, [path]).readers[0].accuracy.value == 1.0
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=problem):
        analyse(packed.key, [path])


def test_other_keys_and_files_that_are_none_are_refused(packed: Pack, tmp_path: Path) -> None:
    other = make(tmp_path / "biopsy", tmp_path / "gan", tmp_path / "other.html", seed=6)
    path = answers(packed, "R1", lambda number, truth: (truth, 5))
    with pytest.raises(ConfigError, match="not in the key"):
        analyse(other.key, [path])
    for key in (packed.page, tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match="key"):
            analyse(key, [path])
    with pytest.raises(ConfigError, match="cannot be read"):
        analyse(packed.key, [tmp_path / "absent.csv"])
    with pytest.raises(ConfigError, match="margin"):
        analyse(packed.key, [path], margin=0.5)
