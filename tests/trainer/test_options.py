"""The table of options matches the signature of the Trainer."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD

from etude.trainer import Trainer
from etude.trainer.options import MAY_CHANGE, RULES, check_options
from helpers.networks import LinearModel, vectors

SIGNATURE = {name: given for name, given in inspect.signature(Trainer).parameters.items() if name != "self"}


def given(**changed: Any) -> dict[str, Any]:
    """All arguments of a Trainer, the defaults among them."""
    return {**{name: parameter.default for name, parameter in SIGNATURE.items()}, "model": LinearModel(), **changed}


def test_the_table_and_the_signature_have_the_same_options_in_the_same_order() -> None:
    assert list(RULES) == list(SIGNATURE)


def test_every_option_is_documented() -> None:
    text = inspect.getdoc(Trainer) or ""
    for name in SIGNATURE:
        assert f"\n    {name}: " in text, name


def test_every_default_passes_its_own_check() -> None:
    check_options(given())


def test_an_option_needs_one_that_exists() -> None:
    assert {rule.needs for rule in RULES.values()} - {None} <= set(SIGNATURE)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.needs])
def test_an_option_without_effect_is_refused(name: str) -> None:
    values = {bool: True, int: 2, str: "1ep"}
    value = values[int if name.endswith("keep") else bool if name.startswith("load") else str]
    with pytest.raises(ValueError, match=f"{name} must come with an? {RULES[name].needs} to have an effect, got"):
        check_options(given(**{name: value}))


def test_settings_hold_exactly_the_options_that_a_resume_looks_at() -> None:
    model = LinearModel()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, vectors(), None, "1ep", optimizers=optimizer, device="cpu", progress_bar=False)
    kept = {name for name, rule in RULES.items() if rule.on_resume is not None}
    assert kept <= set(trainer.state.settings)
    assert set(trainer.state.settings) - kept == {"parameters", "buffers", "world_size", "torch", "python"}
    assert kept >= MAY_CHANGE


def test_options_that_a_resume_ignores_affect_only_files_and_machine() -> None:
    """A new option must be put here, or among the settings: forgetting it would resume a different training."""
    assert {name for name, rule in RULES.items() if rule.on_resume is None} == {
        "eval_dataloader",
        "callbacks",
        "loggers",
        "run_name",
        "progress_bar",
        "save_folder",
        "save_interval",
        "save_num_checkpoints_to_keep",
        "load_path",
        "load_weights_only",
        "autoresume",
        "max_nonfinite_steps",
        "find_unused_parameters",
        "dist_timeout",
    }


def test_relative_paths_are_made_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = check_options(given(save_folder="checkpoints", load_path="old.pt"))
    assert options.save_folder == tmp_path / "checkpoints"
    assert options.load_path == tmp_path / "old.pt"
