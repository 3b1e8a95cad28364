"""Versions, commands and file names in documents and workflows match the repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import etude

ROOT = Path(etude.__file__).parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
SETUP = (ROOT / "setup.cfg").read_text()
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
HOOKS = (ROOT / ".pre-commit-config.yaml").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", ".github/pull_request_template.md"]
SUPPORTED = re.findall(r"Programming Language :: Python :: (3\.\d+)$", SETUP, flags=re.MULTILINE)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


class TestPythonVersions:
    def test_the_workflow_runs_all_supported_ones(self) -> None:
        tested = re.findall(r"python: \[(.*)\]", WORKFLOW)
        assert tested
        for versions in tested:
            assert re.findall(r'"(.*?)"', versions) == SUPPORTED

    def test_the_lowest_is_that_of_setup_cfg_ruff_and_the_readme(self) -> None:
        lowest = min(SUPPORTED, key=number)
        assert f"python_requires = >={lowest}\n" in SETUP
        assert f'target-version = "py{lowest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
        assert f"Python {lowest} or later" in (ROOT / "README.md").read_text()

    def test_contributing_names_all_of_them(self) -> None:
        *others, last = SUPPORTED
        assert f"Python {', '.join(others)} or {last}" in (ROOT / "CONTRIBUTING.md").read_text()


class TestVersion:
    def test_it_is_read_from_the_package_without_importing_torch(self) -> None:
        program = "import sys, etude; print(etude.__version__, 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [etude.__version__, "False"]

    def test_setup_cfg_has_no_second_one(self) -> None:
        assert re.findall(r"^version = (.*)$", SETUP, flags=re.MULTILINE) == ["attr: etude.__version__"]
        tree = ast.parse((ROOT / "__init__.py").read_text())
        literals = [node.value for node in tree.body if isinstance(node, ast.Assign) and is_version(node.targets)]
        assert [ast.literal_eval(literal) for literal in literals] == [etude.__version__]  # setuptools needs a literal

    def test_the_citation_has_the_same_one(self) -> None:
        assert f"\nversion: {etude.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def is_version(targets: list[ast.expr]) -> bool:
    return [target.id for target in targets if isinstance(target, ast.Name)] == ["__version__"]


class TestCommands:
    @pytest.mark.parametrize("path", [*DOCUMENTS, ".ci/run", ".pre-commit-config.yaml"])
    def test_every_make_target_that_is_named_exists(self, path: str) -> None:
        named = re.findall(
            r"(?:^| {4}|`|entry: )make (?:PYTHON=\S+ )?([a-z-]+)", (ROOT / path).read_text(), re.MULTILINE
        )
        assert set(named) <= TARGETS

    def test_every_make_target_is_declared_phony_and_explained(self) -> None:
        (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
        assert set(phony.split()) == TARGETS
        assert set(re.findall(r"^# make ([a-z-]+)", MAKEFILE, flags=re.MULTILINE)) == TARGETS - {"clean"}

    def test_the_workflow_and_the_makefile_run_scripts_that_can_be_run(self) -> None:
        scripts = set(re.findall(r"\.ci/\w+", WORKFLOW + MAKEFILE))
        assert scripts == {".ci/run", ".ci/matrix"}
        for script in scripts:
            assert (ROOT / script).stat().st_mode & 0o111
            subprocess.run(["bash", "-n", ROOT / script], check=True)

    def test_hooks_call_tools_that_make_lint_installs(self) -> None:
        tools = re.findall(r"entry: \.venv/bin/(\w+)", HOOKS)
        (lint,) = re.findall(r"^lint =\n((?:    .*\n)+)", SETUP, flags=re.MULTILINE)
        assert tools
        assert set(tools) <= set(lint.split())

    def test_the_matrix_finds_the_lowest_torch(self) -> None:
        (pattern,) = re.findall(r"^floor=\$\(sed -nE 's/(.*)/\\1/p' setup.cfg\)$", SCRIPT, flags=re.MULTILINE)
        (floor,) = re.findall(pattern, SETUP, flags=re.MULTILINE)
        assert number(floor) >= (2, 0)


SCRIPT = (ROOT / ".ci" / "matrix").read_text()


@pytest.mark.parametrize("path", DOCUMENTS)
def test_files_and_folders_that_a_document_names_exist(path: str) -> None:
    text = (ROOT / path).read_text()
    named = re.findall(r"`(\.?[a-z_]+(?:/[a-z_.]*)+|[a-zA-Z_.]+\.(?:md|cfg|toml|py|cff))`", text)
    linked = re.findall(r"\]\((?!https://)([^)#]+)\)", text)
    generated = {"metrics.jsonl", "weights.pt", "dist/"}
    depth = ROOT / "algorithms" / "stochastic_depth"
    for name in {*named, *linked} - generated:
        assert any((folder / name).exists() for folder in (ROOT, (ROOT / path).parent, depth)), name
