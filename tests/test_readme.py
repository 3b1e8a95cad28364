"""The programs in the README run."""

import re
from pathlib import Path

import pytest

import etude

TEXT = (Path(etude.__file__).parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_there_are_programs() -> None:
    assert len(PROGRAMS) >= 3


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = program.replace('"resnet50"', '"resnet18"').replace('max_duration="1ep"', 'max_duration="2ba"')
    exec(compile("import torch\n" + program, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_point_to_existing_files(target: str) -> None:
    assert target.startswith("https://") or (Path(etude.__file__).parent / target).exists()
