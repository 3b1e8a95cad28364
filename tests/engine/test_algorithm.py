"""The base class of algorithms."""

import inspect
import textwrap

import pytest
import torch

import etude.engine
from etude.engine import Algorithm, Event
from etude.trainer import Trainer
from helpers.networks import LinearModel, vectors


class DoNothing(Algorithm):
    def match(self, event, state):
        return False

    def apply(self, event, state, logger):
        return None


def example() -> type[Algorithm]:
    """The algorithm that the docstring shows."""
    text = inspect.cleandoc(Algorithm.__doc__)
    names = dict(vars(etude.engine))
    exec(textwrap.dedent(text.split("::\n", 1)[1]), names)
    return names["HalveTheLoss"]


def weight_change_of_one_step(algorithms) -> torch.Tensor:
    torch.manual_seed(0)
    model = LinearModel()
    before = model.linear.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Trainer(model, vectors(), None, "1ba", algorithms, optimizer, device="cpu", progress_bar=False).fit()
    return model.linear.weight.detach() - before


def test_the_example_of_the_docstring_halves_the_step():
    plain, halved = weight_change_of_one_step([]), weight_change_of_one_step(example()())
    assert plain.abs().max() > 0
    torch.testing.assert_close(halved, plain / 2)


@pytest.mark.parametrize("missing", ["match", "apply"])
def test_an_algorithm_needs_both_methods(missing):
    other = {"match", "apply"} - {missing}
    incomplete = type("Incomplete", (Algorithm,), {name: getattr(DoNothing, name) for name in other})
    with pytest.raises(TypeError, match=f"abstract.*{missing}"):
        incomplete()


def test_by_default_every_parameter_gets_a_gradient():
    assert DoNothing().find_unused_parameters is False


def test_by_default_there_is_no_state_and_it_loads():
    algorithm = DoNothing()
    assert algorithm.state_dict() == {}
    algorithm.load_state_dict(algorithm.state_dict())


def test_state_that_the_algorithm_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"DoNothing keeps no state, got \['rates', 'steps'\]"):
        DoNothing().load_state_dict({"steps": 3, "rates": []})


@pytest.mark.parametrize("event", Event)
def test_the_example_matches_one_event(event):
    assert example()().match(event, state=None) is (event is Event.AFTER_LOSS)
