"""The settings are the same in `Settings`, StochasticDepth and `cf.apply_stochastic_depth`."""

import inspect
from dataclasses import fields

import etude.functional as cf
from etude.algorithms import StochasticDepth
from etude.algorithms.stochastic_depth import Settings

COMPOSER = ["target_layer_name", "stochastic_method", "drop_rate", "drop_distribution"]


def parameters_of(function: object) -> dict[str, tuple[object, object]]:
    """For each parameter of a function its annotation and default."""
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {one.name: (one.annotation, one.default) for one in found}


def test_the_class_the_function_and_the_settings_declare_the_same() -> None:
    settings, function = parameters_of(Settings), parameters_of(cf.apply_stochastic_depth)
    algorithm = parameters_of(StochasticDepth)
    assert {name: function[name] for name in settings} == settings
    assert {name: algorithm[name] for name in settings} == settings
    assert set(function) - set(settings) == {"model"}
    assert set(algorithm) - set(settings) == {"drop_warmup", "drop_schedule"}


def test_composers_positional_order_is_kept() -> None:
    positional = [
        [one.name for one in inspect.signature(thing).parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
        for thing in (StochasticDepth, cf.apply_stochastic_depth)
    ]
    assert positional[0] == [*COMPOSER, "drop_warmup", "use_same_gpu_seed"]
    assert positional[1] == ["model", *COMPOSER, "use_same_gpu_seed"]


def test_every_setting_is_documented_once() -> None:
    once, elsewhere = inspect.getdoc(Settings), inspect.getdoc(StochasticDepth)
    assert once is not None
    assert elsewhere is not None
    assert all(f"\n    {field.name}: " in once for field in fields(Settings))
    assert not any(f"\n    {field.name}: " in elsewhere for field in fields(Settings))


def test_the_fields_of_the_algorithm_are_its_settings() -> None:
    assert [field.name for field in fields(StochasticDepth)] == list(parameters_of(StochasticDepth))
