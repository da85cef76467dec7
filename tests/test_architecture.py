"""The floors of the house, held against the code's own imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "wsi_pipeline"

# A module may import its own part and the parts named here, nothing else of the package.
BASE = {"errors", "_processes", "_version", "core"}
FLOORS = {
    "errors": set(),
    "_processes": set(),
    "_version": set(),
    "core": {"errors"},
    "readers": BASE,
    "writers": BASE,
    "models": BASE,
    "translators": BASE | {"models"},
    "generators": BASE | {"models", "translators", "readers", "writers"},
    "pipeline": BASE | {"readers", "writers", "generators"},
    "runs": BASE | {"readers", "writers", "generators", "pipeline"},
    "cohorts": BASE | {"readers"},
    "evaluation": BASE | {"models", "readers", "writers", "generators", "cohorts"},
    "training": BASE | {"models", "translators", "readers", "cohorts"},
    "registration": BASE | {"readers", "writers"},
    "study": BASE | {"readers", "cohorts"},
    "volumes": BASE | {"models", "translators", "readers", "writers", "generators"},
    "audit": BASE | {"readers", "writers"},
}
TOP = {
    *("api", "cli", "config", "console", "doctor", "model_api", "models_cli", "__init__"),
    *("audit_cli", "cohort_cli", "convert_cli", "evaluate_cli", "train_cli"),
    *("register_cli", "sample_cli", "series_cli", "study_cli"),
}
CORE_MAY_USE = {"numpy", "scipy", "skimage", "cv2", "wsi_pipeline"} | set(sys.stdlib_module_names)
CORE_MAY_NOT_USE = {"time", "random", "socket", "subprocess", "urllib", "threading", "logging"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Modules that a file imports anywhere, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_floors_below(path: Path) -> None:
    part = part_of(path)
    if part in TOP:
        return
    assert part in FLOORS, f"{part} has no floor: add it to the table"
    for name in imports(path):
        if name.startswith("wsi_pipeline."):
            used = name.split(".")[1]
            assert used == part or used in FLOORS[part], f"{part} must not import {used}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda p: p.stem)
def test_core_is_pure(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)}
    assert used <= CORE_MAY_USE, used - CORE_MAY_USE
    assert not used & CORE_MAY_NOT_USE
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "open" not in calls


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 75, f"{node.name} has {length} lines"


def test_help_loads_no_framework_and_no_slide_library() -> None:
    code = (
        "import sys; import wsi_pipeline.cli; "
        "print([m for m in ('torch', 'numpy', 'tensorstore', 'pydantic', 'openslide') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import wsi_pipeline

    for name in wsi_pipeline.__all__:
        assert getattr(wsi_pipeline, name) is not None


def test_no_print_and_one_broad_except() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path
