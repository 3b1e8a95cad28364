"""The weights in a checkpoint: evaluation and loading."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import etude.functional as cf
from etude import Algorithm, Callback, Trainer
from etude.algorithms import EMA, LabelSmoothing, StochasticDepth
from etude.models import ComposerClassifier
from etude.trainer import CheckpointError, CheckpointSaver, load_evaluation_factors, load_weights
from helpers.networks import images, tiny_resnet
from helpers.parallel_training import make_model as make_model_of_ranks
from helpers.parallel_training import train
from helpers.ranks import run_on_ranks
from helpers.resumable import differences


def make_model() -> ComposerClassifier:
    torch.manual_seed(3)
    return tiny_resnet()


def make_trainer(*algorithms: Algorithm, model: nn.Module | None = None, **settings: Any) -> Trainer:
    model = make_model() if model is None else model
    return Trainer(
        model,
        images(),
        images(num_samples=8),
        "2ep",
        algorithms=algorithms,
        optimizers=SGD(model.parameters(), lr=0.1),
        device="cpu",
        progress_bar=False,
        **settings,
    )


def evaluate(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """What a Trainer that only evaluates gets."""
    trainer = Trainer(model, eval_dataloader=images(num_samples=8), device="cpu", progress_bar=False, **settings)
    metrics = trainer.eval()
    trainer.close()
    return metrics


def train_and_save(folder: Path, *algorithms: Algorithm, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metrics of the last evaluation, and the weights that training ended with."""
    trainer = make_trainer(*algorithms, save_folder=folder, **settings)
    trainer.fit()
    trainer.close()
    return trainer.state.eval_metrics, dict(trainer.state.model.state_dict())


KINDS: dict[str, Any] = {
    "block": lambda: [StochasticDepth(drop_rate=0.5)],
    "sample": lambda: [StochasticDepth(drop_rate=0.5, stochastic_method="sample")],
    "training": lambda: [StochasticDepth(drop_rate=0.5, scaling="training")],
    "warmup": lambda: [StochasticDepth(drop_rate=0.8, drop_warmup="8ba")],
    "averaged": lambda: [EMA("2ba")],
    "both": lambda: [EMA("2ba"), StochasticDepth(drop_rate=0.5), LabelSmoothing(0.1)],
}


def is_close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(abs(one[name] - other[name]) < 1e-5 for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_they_load_into_a_plain_model_that_evaluates_as_the_training_did(kind: str, tmp_path: Path) -> None:
    expected, _ = train_and_save(tmp_path, *KINDS[kind]())
    plain = make_model()
    plain.load_state_dict(load_weights(tmp_path, averaged=kind in ("averaged", "both")))
    assert is_close(evaluate(plain), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_of_the_plain_model_evaluates_a_checkpoint_as_the_training_did(kind: str, tmp_path: Path) -> None:
    expected, _ = train_and_save(tmp_path, *KINDS[kind]())
    assert is_close(evaluate(make_model(), load_path=tmp_path), expected)
    assert evaluate(make_model(), load_path=tmp_path, algorithms=KINDS[kind]()) == expected


def test_the_training_weights_are_loaded_on_request(tmp_path: Path) -> None:
    _, weights = train_and_save(tmp_path, StochasticDepth(drop_rate=0.4), EMA("2ba"))
    assert differences(weights, load_weights(tmp_path, folded=False)) == []
    factors = load_evaluation_factors(tmp_path)
    assert [factor["module"] for factor in factors] == [f"module.{number}" for number in (2, 3, 4, 5)]
    assert [factor["factor"] for factor in factors] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    folded = load_weights(tmp_path)
    for factor in factors:
        assert factor["parameters"] == [f"{factor['module']}.bn3.weight", f"{factor['module']}.bn3.bias"]
        for name in factor["parameters"]:
            assert torch.equal(folded.pop(name), weights[name] * factor["factor"])
    assert differences(folded, {name: weights[name] for name in folded}) == []


def test_the_functional_form_in_the_model_counts_too(tmp_path: Path) -> None:
    model = cf.apply_stochastic_depth(make_model(), drop_rate=0.5)
    trainer = make_trainer(model=model, save_folder=tmp_path)
    trainer.fit()
    expected = trainer.state.eval_metrics
    assert is_close(evaluate(make_model(), load_path=tmp_path), expected)
    assert evaluate(cf.apply_stochastic_depth(make_model(), drop_rate=0.5), load_path=tmp_path) == expected


def test_factors_are_those_of_the_moment_also_between_evaluations(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)
    make_trainer(StochasticDepth(drop_rate=0.8, drop_warmup="8ba"), callbacks=saver).fit()
    for step in (0, 3, 7):
        (path,) = tmp_path.glob(f"*-ba{step}.pt")
        factors = load_evaluation_factors(path)
        assert [1 - factor["factor"] for factor in factors][-1:] == ([pytest.approx(0.1 * step)] if step else [])


def without_last_weights() -> ComposerClassifier:
    model = make_model()
    model.module[4].bn3 = nn.BatchNorm2d(16, affine=False)
    return model


def with_shared_weights() -> ComposerClassifier:
    model = make_model()
    model.module[4].bn3 = model.module[3].bn3
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            without_last_weights,
            r"every branch must end in a normalisation or linear layer with weights.*model\.module\.4",
        ),
        (with_shared_weights, "a layer to fold into must not share its weights"),
    ],
)
def test_a_branch_without_a_layer_to_fold_into_is_refused_with_the_way_out(
    make: Any, reason: str, tmp_path: Path
) -> None:
    expected, _ = train_and_save(tmp_path, StochasticDepth(drop_rate=0.5), model=make())
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_weights(tmp_path)
    assert "folded=False gives the weights as they were trained" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match=reason) as refused:
        evaluate(make(), load_path=tmp_path)
    assert any("with the algorithms of its training" in note for note in refused.value.__notes__)
    assert evaluate(make(), load_path=tmp_path, algorithms=StochasticDepth(drop_rate=0.5)) == expected
    assert any(factor["obstacle"] for factor in load_evaluation_factors(tmp_path))
    assert load_weights(tmp_path, folded=False)


def test_weights_that_need_factors_do_not_start_a_training_without_them(tmp_path: Path) -> None:
    train_and_save(tmp_path, StochasticDepth(drop_rate=0.5))
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"or be folded: model.load_state_dict\(etude.trainer.load_weights\(path\)\)"):
        make_trainer(model=model, load_path=tmp_path, load_weights_only=True)
    assert differences(dict(before), dict(model.state_dict())) == []
    for algorithm in (StochasticDepth(drop_rate=0.1), StochasticDepth(drop_rate=0.5, scaling="training")):
        make_trainer(algorithm, load_path=tmp_path, load_weights_only=True).close()


def test_weights_scaled_in_training_load_anywhere(tmp_path: Path) -> None:
    train_and_save(tmp_path, StochasticDepth(drop_rate=0.5, scaling="training"))
    assert load_evaluation_factors(tmp_path) == []
    assert differences(load_weights(tmp_path), load_weights(tmp_path, folded=False)) == []
    make_trainer(load_path=tmp_path, load_weights_only=True).close()


def test_averages_that_there_are_not(tmp_path: Path) -> None:
    train_and_save(tmp_path, EMA("1ba", ema_start="9ba"))
    with pytest.raises(ValueError, match="averaged must be False for a checkpoint without averages"):
        load_weights(tmp_path, averaged=True)


class Fails(Callback):
    def eval_batch_end(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == 8:
            raise RuntimeError("an evaluation that fails")


def test_a_checkpoint_of_a_failed_evaluation_has_both_kinds_of_weights_in_their_places(tmp_path: Path) -> None:
    train_and_save(tmp_path / "whole", EMA("2ba"))
    with pytest.raises(RuntimeError, match="an evaluation that fails"):
        train_and_save(tmp_path / "failed", EMA("2ba"), callbacks=Fails())
    for averaged in (False, True):
        whole, failed = (load_weights(tmp_path / name, averaged=averaged) for name in ("whole", "failed"))
        assert differences(whole, failed) == []
    resumed = make_trainer(EMA("2ba"), load_path=tmp_path / "failed", load_weights_only=True)
    assert differences(dict(resumed.state.model.state_dict()), load_weights(tmp_path / "whole")) == []


def save_shards(folder: Path) -> None:
    settings = {"parallelism": "fsdp", "callbacks": CheckpointSaver(folder, "1ep")}
    train(make_model_of_ranks(), images(), "1ep", EMA("2ba"), StochasticDepth(drop_rate=0.5), **settings)


@pytest.mark.xdist_group("ranks")
def test_sharded_weights_are_averaged_and_folded_as_others_are(tmp_path: Path) -> None:
    run_on_ranks(2, save_shards, folder=tmp_path)
    plain, trained = load_weights(tmp_path, averaged=True), load_weights(tmp_path, folded=False)
    assert plain.keys() == trained.keys() and differences(plain, trained) != []
    factors = load_evaluation_factors(tmp_path)
    assert len(factors) > 2
    averages = load_weights(tmp_path, folded=False, averaged=True)
    name = factors[-1]["parameters"][0]
    assert torch.equal(plain[name], averages[name] * factors[-1]["factor"])
    model = make_model_of_ranks()
    model.load_state_dict(plain)
    assert is_close(evaluate(model), evaluate(make_model_of_ranks(), load_path=tmp_path))
