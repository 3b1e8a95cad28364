"""The programs of the migration guide run as they stand."""

import re
from pathlib import Path

import pytest

import etude

TEXT = (Path(etude.__file__).parent / "docs" / "migrating.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["composer", "lightning", "timm"])
def test_a_program_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "migrating.md", "exec"), {"__name__": "migrating"})


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`etude\.([a-z_]+)`", TEXT))))
def test_a_module_that_it_names_is_there(name: str) -> None:
    __import__(f"etude.{name}")
