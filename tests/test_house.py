"""Rules of the repository: imports, sizes, public names, contents of the wheel, words."""

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import etude

ROOT = Path(etude.__file__).parent
ROOMS = ("engine", "models", "datasets", "algorithms", "optim", "callbacks", "loggers", "trainer", "cli")
TOP_FOLDERS = (*ROOMS, "recipes", "benchmarks", "docs", "tests")
MAY_IMPORT = {
    "engine": set(),
    "models": set(),
    "datasets": set(),
    "algorithms": {"engine"},
    "optim": {"engine"},
    "callbacks": {"engine"},
    "loggers": {"engine"},
    "trainer": {"engine", "loggers"},
    "functional": {"algorithms", "models"},
    "cli": {"engine", "models", "datasets", "algorithms", "optim", "callbacks", "loggers", "trainer", "functional"},
}
CHECKS = "engine.checks"  # imports nothing of ours, so every room may import it
FILES = [ROOT / "functional.py", *sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]

# Phrases that were replaced by the terms of the field: dropped, dtype, int, continue, remove the hooks, is invalid.
COINED = re.compile(
    r"\b((sit|sits|sat) out|lets? go of|what trains|whole numbers?|number formats?|goes on|breaks? (its|their) rule|"
    r"strangers?|tells? apart|is no number|in company)\b",
    re.IGNORECASE,
)
TEXTS = sorted(
    path
    for pattern in ("*.py", "*.md")
    for path in (*ROOT.glob(pattern), *(found for room in TOP_FOLDERS for found in (ROOT / room).rglob(pattern)))
    if path != Path(__file__)
)


def rooms_imported_by(path: Path) -> set[str]:
    """The other rooms whose names a file imports, wherever in the file."""
    package = ["etude", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = base + (node.module or "").split(".")
            names = [[*target, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "etude":
                is_checks = name[1:3] == CHECKS.split(".")
                found.add(CHECKS if is_checks else next(part for part in [*name[1:], "etude"] if part))
    return found - {path.relative_to(ROOT).parts[0].removesuffix(".py")}


def lengths_of_functions(source: str) -> dict[str, int]:
    """The number of lines of each function, without its signature and docstring."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            last = statements[-1].end_lineno if statements else None
            lengths[node.name] = 0 if last is None else last - statements[0].lineno + 1
    return lengths


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 25
    assert rooms_imported_by(ROOT / "trainer" / "assembly.py") == {"engine", "loggers"}
    assert rooms_imported_by(ROOT / "trainer" / "checks.py") == {"engine", CHECKS}
    assert rooms_imported_by(ROOT / "engine" / "checks.py") == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_direction(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert rooms_imported_by(path) <= MAY_IMPORT[room] | {CHECKS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    lengths = lengths_of_functions(source)
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_coined_phrase_comes_back() -> None:
    found = []
    for path in TEXTS:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if match := COINED.search(line.replace("_", " ")):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert found == []


def test_test_files_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_the_length_of_a_function_is_that_of_its_body() -> None:
    source = """
def outer(
    argument,
):
    '''A docstring
    of two lines.'''

    # A comment.
    def inner():
        return argument

    return inner

class Class:
    async def method(self): return 1
"""
    assert lengths_of_functions(source) == {"outer": 4, "inner": 1, "method": 1}


@pytest.mark.parametrize("name", ["etude", *(f"etude.{room}" for room in ROOMS if room != "cli"), "etude.functional"])
def test_public_names_exist_once_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert module.__all__
    for public in module.__all__:
        thing = getattr(module, public)
        assert thing.__doc__ or public == "Pass"


def test_the_public_names_are_those_of_the_readme() -> None:
    expected = {
        "Algorithm",
        "Callback",
        "Engine",
        "Evaluator",
        "Event",
        "Logger",
        "LoggerDestination",
        "State",
        "Time",
        "TimeUnit",
    }
    assert set(etude.__all__) == expected | {"Timestamp", "Trace", "Trainer"}
    import etude.functional as cf
    from etude import algorithms, models

    assert {"StochasticDepth", "LabelSmoothing"} <= set(algorithms.__all__)
    assert {"composer_resnet", "cifar_resnet", "ComposerClassifier"} <= set(models.__all__)
    assert {"apply_stochastic_depth", "remove_stochastic_depth", "expected_savings", "smooth_labels"} <= set(cf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Orchestra'"):
        _ = etude.Orchestra


def test_importing_etude_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "tyro", "sklearn", "tqdm", "tensorboard", "wandb")
    code = f"import sys, etude, etude.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_rooms_imports_no_package_of_an_extra() -> None:
    rooms = ", ".join(f"etude.{room}" for room in ROOMS)
    extras = (
        "matplotlib",
        "sklearn",
        "tyro",
        "onnx",
        "safetensors",
        "tensorboard",
        "wandb",
        "timm",
        "transformers",
        "torchmetrics",
    )
    code = f"import sys, {rooms}; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wheel_contains_every_module_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    recipes = sorted(ROOT.glob("recipes/*.yaml"))
    tracked = [*FILES, *ROOT.glob("*.py"), *ROOT.rglob("README.md"), *recipes]
    tracked += [ROOT / name for name in ("setup.cfg", "pyproject.toml", "LICENSE", "py.typed")]
    for path in tracked:
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("docs", "benchmarks", "tests") or relative.parts[0].startswith((".", "build")):
            continue
        (source / relative).parent.mkdir(parents=True, exist_ok=True)
        (source / relative).write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"etude-{etude.__version__}-py3-none-any.whl"
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    modules = {f"etude/{path.relative_to(ROOT).as_posix()}" for path in FILES + sorted(ROOT.glob("*.py"))}
    cards = {f"etude/algorithms/{path.parent.name}/README.md" for path in (ROOT / "algorithms").glob("*/README.md")}
    assert len(cards) == len([*(ROOT / "algorithms").glob("*/__init__.py")])
    assert len(recipes) > 10
    assert packed == modules | cards | {f"etude/recipes/{path.name}" for path in recipes} | {"etude/py.typed"}
