"""An evaluation as a library call: sides, pairs, patients, figures, warnings, report."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.cohorts.tiles import IndexedSlide
from wsi_pipeline.core.fid import frechet_distance, kernel_distance, statistics
from wsi_pipeline.core.manifold import overlap
from wsi_pipeline.core.structure import psnr
from wsi_pipeline.errors import CheckpointError, ConfigError, OutputExistsError, SlideError
from wsi_pipeline.evaluation.cautions import side_warnings
from wsi_pipeline.evaluation.evaluate import evaluate
from wsi_pipeline.evaluation.figures import EXPLAINED, averaged
from wsi_pipeline.evaluation.report import render_page
from wsi_pipeline.evaluation.settings import EvaluateConfig, Event, Notice
from wsi_pipeline.evaluation.summary import in_short, side_names
from wsi_pipeline.evaluation.tile_sets import TileSet, open_tiles, pair_up
from wsi_pipeline.models.features import make_extractor

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 96
QUICK = EvaluateConfig(draws=20, kid_subsets=10, batch=4, workers=1, device="cpu", examples=2, worst=2)


def tile(seed: int, purple: float = 1.0, pink: float = 1.0) -> np.ndarray:
    """Nuclei on pink fibres; the same seed has the same structure."""
    rng = np.random.default_rng(seed)
    haem = np.full((SIDE, SIDE), 0.05, np.float32)
    for _ in range(30):
        y, x = rng.integers(0, SIDE, 2).tolist()
        cv2.ellipse(haem, (x, y), (int(rng.integers(3, 6)), 3), float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    haem = cv2.GaussianBlur(haem, (0, 0), 0.8) * purple
    eosin = pink * (0.5 + 0.2 * np.sin(np.arange(SIDE) / 5.0 + seed)[:, None] * np.ones((1, SIDE)))
    od = haem[..., None] * np.array([0.65, 0.70, 0.29]) + eosin[..., None] * np.array([0.07, 0.99, 0.11])
    return np.clip(np.rint(240 * np.exp(-od)), 0, 255).astype(np.uint8)


def save(folder: Path, name: str, pixels: np.ndarray, **options: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source: dark; generated: the same in the reference's colours; reference: other tissue."""
    root = tmp_path_factory.mktemp("sides")
    for patient in range(4):
        for number in range(3):
            seed, name = 10 * patient + number, f"patient{patient}_{number}.png"
            save(root / "source", name, tile(seed, purple=1.6, pink=1.4))
            save(root / "generated", name, tile(seed, purple=0.9, pink=0.7))
            save(root / "reference", name.replace("patient", "other"), tile(1000 + seed, 0.9, 0.7))
    return root


def run(root: Path, config: EvaluateConfig = QUICK, **options):  # type: ignore[no-untyped-def]
    return evaluate(str(root / "generated"), str(root / "reference"), config, **options)


def test_figures_are_those_of_the_functions(sides: Path) -> None:
    result = run(sides, replace(QUICK, source=str(sides / "source")))
    extract = make_extractor("tiny")

    def features(name: str) -> np.ndarray:
        files = sorted((sides / name).glob("*.png"))
        return extract(np.stack([np.asarray(Image.open(path)) for path in files]))

    made, real, given = (features(name) for name in ("generated", "reference", "source"))
    fid = frechet_distance(statistics(made), statistics(real))
    assert result.figure("fid").value == pytest.approx(fid, rel=1e-6)
    assert result.figure("kid").value == pytest.approx(
        kernel_distance(made, real, subsets=10, seed=0), rel=1e-9
    )
    before = frechet_distance(statistics(given), statistics(real))
    assert result.figure("fid_source").value == pytest.approx(before, rel=1e-6)
    assert fid < 0.2 * before
    assert result.figure("structure_ssim").value > 0.97
    assert [figure.key for figure in result.figures] == [
        key for key in EXPLAINED if result.figure(key) is not None
    ]


def test_intervals_are_by_patient_and_hold_the_value(sides: Path) -> None:
    result = run(sides, replace(QUICK, source=str(sides / "source")))
    assert result.side("generated").patients == 4
    assert result.side("generated").group_rule == "file name without trailing numbers"
    for figure in result.figures:
        assert figure.interval is not None, figure.key
        assert figure.interval.low <= figure.value <= figure.interval.high, figure.key
    assert result.figure("structure_ssim").interval.groups == 4
    assert result.figure("fid").interval.groups == 8
    assert run(sides, replace(QUICK, draws=0)).figure("fid").interval is None


def text_of(page: Path) -> str:
    """The page without its pictures."""
    return re.sub(r"data:[^\"]*", "", page.read_text())


def test_two_runs_are_equal(sides: Path, tmp_path: Path) -> None:
    config = replace(QUICK, source=str(sides / "source"))
    first = run(sides, config, report=tmp_path / "a.html")
    second = run(sides, replace(config, workers=3, batch=5), report=tmp_path / "b.html")
    for one, other in zip(first.figures, second.figures, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5, abs=1e-9), one.key
        assert one.interval is not None
        assert one.interval.low == pytest.approx(other.interval.low, rel=1e-5, abs=1e-6), one.key
    assert text_of(tmp_path / "a.html") == text_of(tmp_path / "b.html")


def test_truth_is_compared_pair_by_pair(sides: Path, tmp_path: Path) -> None:
    for path in (sides / "generated").iterdir():
        pixels = np.asarray(Image.open(path)).astype(int)
        save(tmp_path / "reference", path.name, np.clip(pixels + 8, 0, 255).astype(np.uint8))
    result = evaluate(
        str(sides / "generated"),
        str(tmp_path / "reference"),
        replace(QUICK, paired=True, fid=False, kid=False),
    )
    first = sorted((sides / "generated").iterdir())[0].name
    wanted = psnr(
        np.asarray(Image.open(tmp_path / "reference" / first)),
        np.asarray(Image.open(sides / "generated" / first)),
    )
    assert result.tiles.values["psnr"][0] == pytest.approx(wanted)
    assert result.figure("psnr").value == pytest.approx(10 * np.log10(255**2 / 64), abs=0.5)
    assert result.figure("true_structure_ssim").value > 0.97
    assert result.figure("fid") is None


def test_damage_is_seen_and_the_worst_tile_is_named(sides: Path, tmp_path: Path) -> None:
    for path in (sides / "generated").iterdir():
        save(tmp_path / "generated", path.name, np.asarray(Image.open(path)))
    ruined = tmp_path / "generated" / "patient2_1.png"
    Image.fromarray(cv2.GaussianBlur(np.asarray(Image.open(ruined)), (0, 0), 4)).save(ruined)
    config = replace(QUICK, source=str(sides / "source"))
    result = evaluate(str(tmp_path / "generated"), None, config, report=tmp_path / "r.html")
    scores = result.tiles.values["structure_ssim"]
    assert result.tiles.names[int(np.argmin(scores))] == "patient2_1"
    assert scores.min() < 0.6 < 0.97 < np.sort(scores)[1]
    page = (tmp_path / "r.html").read_text()
    assert page.index("Worst structure") < page.index("patient2_1", page.index("Worst structure"))
    assert any("1 of 12 tiles has a similarity below 0.7" in line for line in in_short(result))


def test_warnings_say_what_is_wrong_with_the_comparison(sides: Path, tmp_path: Path) -> None:
    for path in (sides / "reference").iterdir():
        save(tmp_path / "reference", f"{path.stem}.jpg", np.asarray(Image.open(path)), quality=75)
    heard: list[Event] = []
    result = evaluate(str(sides / "generated"), str(tmp_path / "reference"), QUICK, emit=heard.append)
    said = " | ".join(result.warnings)
    assert "encodings differ (generated PNG, reference JPEG of quality 75)" in said
    assert "12 generated, 12 reference tiles for 64 features: the covariance is rank-deficient" in said
    assert "4 patients (by file name without trailing numbers) make a rough interval" in said
    assert "extractor tiny is for a quick look" in said
    assert [e.message for e in heard if isinstance(e, Notice)] == list(result.warnings)
    assert (result.side("reference").encoding, result.side("reference").tiles) == ("JPEG of quality 75", 12)
    assert result.extractor.resize == "none (tiles at their own size)"


def test_tiles_of_another_size_are_a_warning_between_sets(sides: Path, tmp_path: Path) -> None:
    for path in (sides / "reference").iterdir():
        save(tmp_path / "reference", path.name, np.asarray(Image.open(path))[:64, :64])
    result = evaluate(str(sides / "generated"), str(tmp_path / "reference"), QUICK)
    assert any("96 x 96 px, reference tiles 64 x 64" in line for line in result.warnings)


@pytest.mark.parametrize(
    ("names", "groups", "rule"),
    [
        (["a/x1.png", "a/x2.png", "b/x1.png"], ["a", "a", "b"], "sub-folder"),
        (["s1_0_512.png", "s1_512_0.png", "s2_0_0.png"], ["s1", "s1", "s2"], "file name"),
        (["case-a_01.png", "case-a_02.png", "case-b_01.png"], ["case-a", "case-a", "case-b"], "file name"),
        (
            ["TCGA-18-3408-01A-01-BS1.6da3_17.png", "TCGA-18-3408-11A-01-TS1.aa_3.png"],
            ["TCGA-18-3408", "TCGA-18-3408"],
            "TCGA barcode",
        ),
    ],
)
def test_patients_are_guessed_from_names_and_the_rule_is_told(
    tmp_path: Path, names: list[str], groups: list[str], rule: str
) -> None:
    for name in names:
        save(tmp_path, name, tile(1))
    found = open_tiles(str(tmp_path), "generated", QUICK)
    assert list(found.groups) == groups
    assert found.group_rule.startswith(rule)


def test_pairs_are_found_by_name_whatever_the_ending_and_folder(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "left", f"t{number}.png", tile(number))
        save(tmp_path / "right", f"t{number}.jpg", tile(number))
        save(tmp_path / "deep", f"x/t{number}.png", tile(number))
    save(tmp_path / "right", "extra.jpg", tile(9))
    left, right, deep = (open_tiles(str(tmp_path / n), "source", QUICK) for n in ("left", "right", "deep"))
    assert [(left.names[i], right.names[j]) for i, j in pair_up(left, right)] == [
        (f"t{n}",) * 2 for n in range(3)
    ]
    assert len(pair_up(left, deep)) == 3
    save(tmp_path / "else", "other.png", tile(0))
    with pytest.raises(ConfigError, match="no tile has the name or position"):
        pair_up(left, open_tiles(str(tmp_path / "else"), "source", QUICK))


def test_folders_of_splits_and_domains_are_no_patients(tmp_path: Path) -> None:
    for place in ("trainB", "valB", "FFPE/test"):
        for number in range(2):
            save(tmp_path, f"{place}/case_{number}.png", tile(number))
    found = open_tiles(str(tmp_path), "reference", QUICK)
    assert (set(found.groups), found.group_rule) == ({"case"}, "file name without trailing numbers")
    save(tmp_path, "trainB/p7/x.png", tile(0))
    save(tmp_path, "valB/p7/x.png", tile(0))
    assert set(open_tiles(str(tmp_path), "reference", QUICK).groups) == {"", "p7"}


@pytest.mark.parametrize("double", ["t0.jpg", "FF/t0.png"])
def test_a_partner_of_which_there_are_two_is_refused(tmp_path: Path, double: str) -> None:
    for name in ("t0.png", "t1.png"):
        save(tmp_path / "one", name, tile(0))
        save(tmp_path / "two", name, tile(0))
    save(tmp_path / "two", double, tile(50))
    one, two = (open_tiles(str(tmp_path / name), "source", QUICK) for name in ("one", "two"))
    for sides_ in ((one, two), (two, one)):
        with pytest.raises(ConfigError, match="have one name") as caught:
            pair_up(*sides_)
        assert str(tmp_path / "two" / "t0.png") in str(caught.value)
        assert str(tmp_path / "two" / double) in str(caught.value)
    save(tmp_path / "alone", "t1.png", tile(0))  # who has no use for them is not troubled
    assert len(pair_up(open_tiles(str(tmp_path / "alone"), "source", QUICK), two)) == 1


def test_positions_on_other_lattices_are_no_pairs(sides: Path) -> None:
    def on(lattice: float, name: str) -> TileSet:
        found = open_tiles(str(sides / name), "source", QUICK)
        slide = IndexedSlide(path="s.tif", name="s.tif", lattice=(lattice, lattice), pair="P")
        index = replace(found.index, slides=(slide,), slide_N=np.zeros(len(found), np.int32))
        return replace(found, index=index, keys=tuple(f"P@0,{96 * x}" for x in range(len(found))))

    assert len(pair_up(on(0.5, "generated"), on(0.5003, "source"))) == 12
    with pytest.raises(ConfigError, match=r"0\.46 µm.*0\.5: .*tile --set tiling\.tolerance=0"):
        pair_up(on(0.5, "generated"), on(0.46, "source"))


def test_the_short_words_say_what_the_figures_cannot(sides: Path, tmp_path: Path) -> None:
    config = replace(QUICK, fid=True)
    alone = " ".join(in_short(run(sides, config)))
    assert "(of so few tiles, which raise it by themselves: it says little)" in alone
    assert "0: equal sets" not in alone
    both = " ".join(in_short(run(sides, replace(config, source=str(sides / "source")))))
    assert "; so few tiles raise both figures by themselves" in both
    result = run(sides, config)
    plenty = replace(result, warnings=())
    assert "(0: equal sets)" in " ".join(in_short(plenty))
    fid, kid = result.figure("fid"), result.figure("kid")
    for low, said in ((-0.01, True), (0.01, False)):
        interval = replace(kid.interval, low=low, high=0.5)
        figures = (fid, replace(kid, interval=interval))
        short = " ".join(in_short(replace(result, figures=figures)))
        assert ("no difference from the reference set is shown" in short) == said


def test_sides_of_one_name_are_told_apart(sides: Path) -> None:
    result = run(sides)
    assert side_names(result) == {"generated": "generated", "reference": "reference"}
    origins = {"generated": "/data/run1/valB", "reference": "/data/cohort/valB"}
    alike = replace(result, sides=tuple(replace(s, origin=origins[s.role]) for s in result.sides))
    assert side_names(alike) == {"generated": "run1/valB", "reference": "cohort/valB"}
    assert "Generated <b>run1/valB</b> against reference <b>cohort/valB</b>" in render_page(alike, None)


def test_patients_that_are_stated_are_not_called_guesses(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "coded", f"TCGA-18-340{number}-01A-01-BS1.png", tile(number))
        save(tmp_path / "named", f"case{number}x.png", tile(number))
    coded, named = (
        side_warnings(open_tiles(str(tmp_path / name), "generated", QUICK)) for name in ("coded", "named")
    )
    assert coded == ["generated: 3 patients (by TCGA barcode), one tile of each, make a rough interval"]
    assert "every tile counts as a patient of its own (by file name" in named[0]


def test_only_sources_of_generated_tiles_count(sides: Path, tmp_path: Path) -> None:
    """Otherwise FID before translation would be that of another set."""
    for path in (sides / "source").iterdir():
        save(tmp_path / "source", path.name, np.asarray(Image.open(path)))
    for number in range(20):
        save(tmp_path / "source", f"unused_{number}.png", tile(500 + number, purple=3.0))
    few, many = (
        run(sides, replace(QUICK, source=str(root / "source"))).figure("fid_source")
        for root in (sides, tmp_path)
    )
    assert (few.value, few.tiles) == (many.value, many.tiles)


def test_a_split_is_asked_of_sides_that_have_splits(sides: Path, tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "cohort" / "FFPE" / "test", f"a_{number}.png", tile(number))
        save(tmp_path / "cohort" / "FFPE" / "train", f"b_{number}.png", tile(50 + number))
        save(tmp_path / "cohort" / "FF" / "test", f"a_{number}.png", tile(90 + number))
    config = replace(QUICK, split="test")
    result = evaluate(str(sides / "generated"), str(tmp_path / "cohort"), config)
    assert (result.side("generated").tiles, result.side("reference").tiles) == (12, 4)


def test_jpeg_quality_is_read_from_the_tables(tmp_path: Path) -> None:
    for quality in (30, 50, 75, 90, 95, 100):
        save(tmp_path / str(quality), "t.jpg", tile(0), quality=quality)
        found = open_tiles(str(tmp_path / str(quality)), "generated", QUICK)
        assert found.encoding == f"JPEG of quality {quality}"


def test_limit_takes_a_seeded_choice(sides: Path) -> None:
    some = [
        open_tiles(str(sides / "generated"), "generated", replace(QUICK, limit=5, seed=seed)).names
        for seed in (1, 1, 2)
    ]
    assert len(some[0]) == 5
    assert some[0] == some[1] != some[2]


def refusal(call: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_work_is_told_in_a_line(sides: Path, tmp_path: Path) -> None:
    made, real = str(sides / "generated"), str(sides / "reference")
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refusal(lambda: evaluate(str(tmp_path / "empty"), real), ConfigError)
    assert "no such folder" in refusal(lambda: evaluate(str(tmp_path / "absent"), real), ConfigError)
    save(tmp_path / "mixed", "a.png", tile(0))
    save(tmp_path / "mixed", "b.png", tile(0)[:50])
    assert "several sizes (1 of 96 x 96 px, 1 of 50 x 96 px)" in refusal(
        lambda: evaluate(str(tmp_path / "mixed"), real), ConfigError
    )
    assert "nothing to compare it with" in refusal(lambda: evaluate(made), ConfigError)
    assert "--paired" in refusal(
        lambda: evaluate(made, None, replace(QUICK, paired=True, source=real)), ConfigError
    )
    save(tmp_path / "one", "a.png", tile(0))
    assert "at least 2 images" in refusal(lambda: evaluate(str(tmp_path / "one"), real, QUICK), ConfigError)
    weights = replace(QUICK, weights=str(tmp_path / "absent.pt"))
    assert "inception" in refusal(lambda: evaluate(made, real, weights), CheckpointError)
    for bad in ({"draws": -1}, {"limit": 1}, {"min_tissue": 2.0}, {"batch": 0}, {"seed": 2**32}):
        name = next(iter(bad))
        assert name in refusal(lambda bad=bad: replace(QUICK, **bad), ConfigError)


def test_a_picture_that_ends_early_names_its_file(sides: Path, tmp_path: Path) -> None:
    for path in (sides / "generated").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "patient1_1.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    assert "patient1_1" in refusal(
        lambda: evaluate(str(tmp_path), str(sides / "reference"), QUICK), SlideError
    )


def test_nothing_is_overwritten_unasked(sides: Path, tmp_path: Path) -> None:
    (tmp_path / "r.png").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"r\.png: exists already"):
        run(sides, report=tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]
    run(sides, report=tmp_path / "r.html", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.png"]


def test_saved_statistics_serve_as_a_reference(sides: Path, tmp_path: Path) -> None:
    evaluate(str(sides / "reference"), None, QUICK, save_stats=tmp_path / "ref.npz")
    direct = run(sides)
    stored = evaluate(str(sides / "generated"), str(tmp_path / "ref.npz"), QUICK)
    assert stored.figure("fid").value == pytest.approx(direct.figure("fid").value, abs=1e-6)
    assert stored.figure("kid").value == pytest.approx(direct.figure("kid").value, abs=1e-6)
    assert stored.figure("fid").interval is not None
    assert stored.side("reference").patients == 4


def test_statistics_of_another_extractor_are_refused(sides: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    np.savez(tmp_path / "five.npz", mu=rows.mean(axis=0), sigma=np.cov(rows, rowvar=False))
    with pytest.raises(ConfigError, match=r"5 features\), not by tiny"):
        evaluate(str(sides / "generated"), str(tmp_path / "five.npz"), QUICK)


def test_statistics_without_features_give_fid_only(sides: Path, tmp_path: Path) -> None:
    found = open_tiles(str(sides / "reference"), "reference", QUICK)
    features = make_extractor("tiny")(np.stack([found.read(row) for row in range(len(found))]))
    np.savez(tmp_path / "custom_na.npz", mu=features.mean(axis=0), sigma=np.cov(features, rowvar=False))
    result = evaluate(str(sides / "generated"), str(tmp_path / "custom_na.npz"), QUICK)
    assert result.figure("fid").value == pytest.approx(run(sides).figure("fid").value, abs=1e-6)
    assert result.figure("fid").note == "interval over patients of the generated side only"
    assert result.figure("kid") is None


class _Outline(html.parser.HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_needs_nothing_else_and_escapes_names(sides: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<script>alert(1)</script> & gen"
    for path in (sides / "generated").iterdir():
        save(odd, f"<b>{path.name}", np.asarray(Image.open(path)))
        save(tmp_path / "src", f"<b>{path.name}", np.asarray(Image.open(sides / "source" / path.name)))
    config = replace(QUICK, source=str(tmp_path / "src"))
    result = evaluate(str(odd), str(sides / "reference"), config, report=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    outline = _Outline(page)
    assert outline.open == []
    assert not {"script", "link", "iframe", "b>"} & set(outline.tags)
    assert all(link.startswith("data:image/png;base64,") for link in outline.links)
    assert len(outline.links) == 2 * 3 + 2 * 3
    assert "http" not in page
    assert "url(" not in page
    assert "&lt;script&gt;" in page
    for figure in result.figures:
        assert figure.text in page
        assert figure.explained.label in page
    assert "not for diagnosis" in page
    assert "Examples" in page
    assert "Examples" not in render_page(result, None)


def test_the_json_file_holds_every_figure_and_no_nan(sides: Path, tmp_path: Path) -> None:
    glass = np.full((SIDE, SIDE, 3), 240, np.uint8)
    for name in ("generated", "source"):
        for path in (sides / name).iterdir():
            save(tmp_path / name, path.name, np.asarray(Image.open(path)))
        save(tmp_path / name, "patient9_0.png", glass)
    config = replace(QUICK, source=str(tmp_path / "source"))
    result = evaluate(
        str(tmp_path / "generated"), str(sides / "reference"), config, report=tmp_path / "r.html"
    )
    document = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert document["figures"]["fid"]["value"] == pytest.approx(result.figure("fid").value)
    assert document["tiles"]["structure_ssim"][-1] is None
    assert document["figures"]["structure_ssim"]["tiles"] == 12
    assert document["notice"] == "synthetic images; not for diagnosis"
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 900
        assert picture.height > 900


def test_a_mean_leaves_out_what_is_unknown() -> None:
    values = np.array([1.0, np.nan, 3.0, 4.0])
    figure = averaged("ssim", values, ["a", "b", "a", "c"], draws=30, seed=0)
    assert figure is not None
    assert (figure.value, figure.tiles) == (pytest.approx(8 / 3), 3)
    shares = averaged("matched", np.array([1.0, 1.0, 0.9]), ["a", "b", "c"], draws=50, seed=0)
    assert shares is not None
    assert shares.interval is not None
    assert 0.9 <= shares.interval.low < shares.interval.high <= 1.0
    assert averaged("ssim", np.full(2, np.nan), ["a", "b"], draws=5, seed=0) is None
    endless = averaged("psnr", np.array([30.0, np.inf]), ["a", "b"], draws=5, seed=0)
    assert endless is not None
    assert (endless.text, endless.interval, endless.to_json()["value"]) == ("infinite", None, None)


def test_dino_and_lpips_join_where_weights_are_given(
    sides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi_pipeline.evaluation import evaluate as module

    monkeypatch.setattr(module, "load_lpips", lambda vgg, device: lambda a, b: np.full(len(a), 0.25))
    monkeypatch.setattr(module, "load_dino", lambda weights, device: lambda a, b: np.full(len(a), 0.5))
    config = replace(QUICK, source=str(sides / "source"), dino="dino.pth", fid=False, kid=False)
    result = run(sides, config)
    assert result.figure("lpips_source").value == 0.25
    assert result.figure("dino_structure").value == 0.5
    assert not re.search("LPIPS was left out", " ".join(result.warnings))


def test_overlap_stands_beside_two_halves_of_the_reference(sides: Path) -> None:
    result = run(sides, replace(QUICK, source=str(sides / "source")))
    extract = make_extractor("tiny")
    made, real = (
        extract(np.stack([np.asarray(Image.open(path)) for path in sorted((sides / name).glob("*.png"))]))
        for name in ("generated", "reference")
    )
    wanted = overlap(made, real)
    for key in ("precision", "recall", "density", "coverage"):
        figure = result.figure(key)
        assert figure.value == pytest.approx(getattr(wanted, key).mean()), key
        assert re.fullmatch(r"real halves: \d\.\d{3} \(6 tiles each\)", figure.note), figure.note
        assert figure.interval.groups == 4, "patients of the side whose tiles are counted"
        assert result.figure(f"{key}_source") is None
    assert run(sides, replace(QUICK, overlap=False)).figure("precision") is None


def test_black_borders_of_a_registered_truth_do_not_count(sides: Path, tmp_path: Path) -> None:
    for path in (sides / "generated").iterdir():
        truth = np.clip(np.asarray(Image.open(path)).astype(int) + 8, 1, 255).astype(np.uint8)
        truth[:30] = 0
        save(tmp_path / "truth", path.name, truth)
    config = replace(QUICK, paired=True, fid=False, kid=False)
    result = evaluate(str(sides / "generated"), str(tmp_path / "truth"), config)
    assert result.figure("mae").value == pytest.approx(8.0, abs=0.2)
    assert result.figure("psnr").value == pytest.approx(10 * np.log10(255**2 / 64), abs=0.5)
    assert result.figure("ssim").value > 0.97
    assert result.figure("true_structure_ssim").value > 0.9
    assert 1.3 < result.figure("nmi").value <= 2.0
    assert result.figure("nmi").interval is not None


LAB = """
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.generators.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover(Identity):
    def __call__(self, batch, context):
        return np.roll(batch.pixels_BHWC, 3, axis=2)


def tissues(pixels_HWC):
    return np.where(pixels_HWC[..., 0] < 170, 2, 1)


def nonsense(pixels_HWC):
    return pixels_HWC / 255
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of somebody else with a translator that moves tissue and a segmenter."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "lab_of_others.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    return "lab_of_others"


def test_a_translator_is_tried_on_turned_tiles(sides: Path, lab: str) -> None:
    config = replace(QUICK, source=str(sides / "source"), fid=False, kid=False)
    still = evaluate(str(sides / "generated"), None, replace(config, translator="identity"))
    assert still.figure("equivariance").value == 0.0
    assert still.figure("translator_shift").value == pytest.approx(0.0, abs=1e-6)
    assert still.figure("equivariance").tiles == 8
    assert still.figure("equivariance").interval.groups == 4
    moved = evaluate(str(sides / "generated"), None, replace(config, translator=f"{lab}:Mover"))
    assert moved.figure("equivariance").value > 5
    assert moved.figure("translator_shift").value == pytest.approx(3.0, abs=0.2)
    assert moved.figure("shift_median").value < 0.5, "that of the generated tiles is another question"
    wrong = replace(config, translator="identity=weights.safetensors")
    assert "unknown option" in refusal(lambda: evaluate(str(sides / "generated"), None, wrong), ConfigError)


def test_tissue_maps_lie_between_floor_and_ceiling(sides: Path, tmp_path: Path, lab: str) -> None:
    for number, path in enumerate(sorted((sides / "generated").iterdir())):
        pixels = np.asarray(Image.open(path))
        save(tmp_path / "truth", path.name, pixels)
        save(tmp_path / "made", path.name, np.roll(pixels, 2, axis=1))
        save(tmp_path / "next", path.name, np.roll(pixels, 1, axis=0))
        save(tmp_path / "before", path.name, tile(500 + number, 0.9, 0.7))
    config = replace(
        QUICK,
        paired=True,
        fid=False,
        kid=False,
        source=str(tmp_path / "before"),
        segmenter=f"{lab}:tissues",
        neighbour=str(tmp_path / "next"),
    )
    result = evaluate(str(tmp_path / "made"), str(tmp_path / "truth"), config)
    figure = result.figure("tissue_f1")
    floor, ceiling = (float(re.search(rf"{word} ([\d.]+)", figure.note)[1]) for word in ("floor", "ceiling"))
    assert floor < figure.value < ceiling < 1.0
    assert re.match(r"class 1 0\.\d{3}, class 2 0\.\d{3}, floor", figure.note)
    share = (figure.value - floor) / (ceiling - floor)
    assert result.figure("tissue_f1_placed").value == pytest.approx(share, abs=0.01)
    assert figure.interval.low <= figure.value <= figure.interval.high
    alone = replace(config, source=None, neighbour=None)
    same = evaluate(str(tmp_path / "truth"), str(tmp_path / "truth"), alone)
    assert same.figure("tissue_f1").value == 1.0
    assert same.figure("tissue_f1_placed") is None
    bad = replace(alone, segmenter=f"{lab}:nonsense")
    assert "one whole number" in refusal(
        lambda: evaluate(str(tmp_path / "truth"), str(tmp_path / "truth"), bad), ConfigError
    )


def test_variety_is_told_beside_that_of_the_reference(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "made", f"a{number}.png", np.tile(tile(1), (2, 2, 1))[:128, :128])
        save(tmp_path / "real", f"b{number}.png", np.tile(tile(number), (2, 2, 1))[:128, :128])
    config = replace(QUICK, diversity=3, fid=False, kid=False)
    figure = evaluate(str(tmp_path / "made"), str(tmp_path / "real"), config).figure("diversity")
    assert figure.value == pytest.approx(1.0, abs=1e-5)
    assert 0.0 < float(figure.note.rpartition("reference: ")[2]) < 0.6
    assert evaluate(str(tmp_path / "made"), str(tmp_path / "real"), QUICK).figure("diversity") is None


def test_the_inception_score_rests_on_logits(sides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_pipeline.evaluation import evaluate as module

    class Logits:
        name, dims, side, resize, digest = "inception_logits", 3, None, "none", "0" * 64

        def __call__(self, pixels_BHWC: np.ndarray) -> np.ndarray:
            return pixels_BHWC.mean(axis=(1, 2)).astype(np.float32) / 50

    monkeypatch.setattr(module, "make_extractor", lambda *_, **__: Logits())
    figure = run(sides).figure("inception_score")
    assert 1.0 <= figure.value < 1.1
    assert re.search(r"ten shuffled parts 0\.\d{3}; reference 1\.\d{3}", figure.note)


def test_probes_that_cannot_work_are_told_in_a_line(sides: Path) -> None:
    made, real = str(sides / "generated"), str(sides / "reference")
    for bad, words in (
        ({"translator": "identity"}, "--translator: is tried on source tiles"),
        ({"segmenter": "json:loads"}, "--segmenter: its maps are compared"),
        ({"segmenter": "json:lods", "paired": True}, "segmenter json:lods: cannot be imported"),
        ({"segmenter": "no_such_module", "paired": True}, "give package.module:function"),
        ({"diversity": 5, "fid": False, "kid": False}, "112 px or more"),
    ):
        assert words in refusal(lambda bad=bad: evaluate(made, real, replace(QUICK, **bad)), ConfigError)
