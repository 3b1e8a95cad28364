"""Invalid arguments of the Trainer raise before the model is changed."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from etude.algorithms import StochasticDepth
from etude.engine import Callback, Time
from etude.trainer import Trainer, checks
from helpers.networks import LinearModel, images, tiny_resnet


def arguments(model) -> dict:
    """What builds a Trainer whose algorithm changes the model at INIT."""
    return {
        "model": model,
        "train_dataloader": images(),
        "eval_dataloader": images(),
        "max_duration": "1ep",
        "algorithms": StochasticDepth(),
        "device": "cpu",
        "progress_bar": False,
    }


def looks(model: nn.Module) -> list:
    return [(type(module), module.training) for module in model.modules()]


def foreign_optimizer() -> SGD:
    return SGD(LinearModel().parameters(), lr=0.1)


BAD = [
    ("train_dataloader", 3, TypeError, "train_dataloader must be an iterable of batches, got 3"),
    ("train_dataloader", [], ValueError, "train_dataloader must yield at least one batch, its length is 0"),
    ("train_dataloader", {"a": images()}, TypeError, "train_dataloader must be an iterable of batches, got a dict"),
    ("eval_dataloader", 3, TypeError, "eval_dataloader must be an iterable of batches, got 3"),
    ("eval_dataloader", {"a": 3}, TypeError, "eval_dataloader 'a' must be an iterable of batches, got 3"),
    ("eval_dataloader", [images()], TypeError, "eval_dataloader must be one dataloader, got a list of several"),
    ("eval_dataloader", "digits", TypeError, "eval_dataloader must be an iterable of batches, got a str"),
    ("eval_dataloader", [], ValueError, "eval_dataloader must yield at least one batch, its length is 0"),
    ("max_duration", 3.5, TypeError, "max_duration must be a Time or a time string"),
    ("max_duration", True, TypeError, "max_duration must be a Time or a time string"),
    ("max_duration", 0, ValueError, 'max_duration must be positive, got "0ep"'),
    ("max_duration", "soon", ValueError, "max_duration: a time string must be like"),
    ("max_duration", "3epochs", ValueError, "max_duration: the unit of a time must be one of"),
    ("max_duration", "1.5ep", TypeError, 'max_duration: a time in "ep" must be an int, got 1.5'),
    ("max_duration", "0ep", ValueError, 'max_duration must be positive, got "0ep"'),
    ("max_duration", "-2ba", ValueError, 'max_duration must be positive, got "-2ba"'),
    ("max_duration", Time(0, "sp"), ValueError, 'max_duration must be positive, got "0sp"'),
    ("max_duration", "0.5dur", ValueError, 'max_duration must be in epochs, batches or samples ("ep", "ba", "sp")'),
    ("eval_interval", 1.5, TypeError, "eval_interval must be a Time or a time string"),
    ("eval_interval", "often", ValueError, "eval_interval: a time string must be like"),
    ("eval_interval", -1, ValueError, "eval_interval must be at least 0 and in epochs, batches, samples or a fraction"),
    ("eval_interval", "-1ba", ValueError, "eval_interval must be at least 0 and in epochs"),
    ("eval_interval", "5min", ValueError, "eval_interval must be at least 0 and in epochs"),
    ("eval_interval", "1.5dur", ValueError, 'eval_interval must be at most "1dur", the whole training, got "1.5dur"'),
    ("train_subset_num_batches", 0, ValueError, "train_subset_num_batches must be an int >= 1, or -1 for all, got 0"),
    ("eval_subset_num_batches", -2, ValueError, "eval_subset_num_batches must be an int >= 1, or -1 for all, got -2"),
    *(
        (
            "device_train_microbatch_size",
            size,
            ValueError if type(size) is int else TypeError,
            f'must be an int >= 1, or "auto", got {size!r}',
        )
        for size in (0, -1, 1.5, True, "4")
    ),
    *(
        (
            "seed",
            seed,
            ValueError if type(seed) is int else TypeError,
            f"seed must be an int in [0, 2**32), got {seed!r}",
        )
        for seed in (-1, 2**32, 1.5, True, None, "0")
    ),
    *(
        ("device", device, ValueError, f'device must be "cpu", "gpu" or a torch device, got {device!r}')
        for device in ("nowhere", "cpu:x", 1.5)
    ),
    *(
        (
            "precision",
            precision,
            ValueError,
            f"precision must be one of 'fp32', 'amp_bf16', 'amp_fp16', got {precision!r}",
        )
        for precision in ("fp8", "FP32", "", None)
    ),
    *(
        (
            "run_name",
            name,
            ValueError,
            f"run_name must be letters, digits and . _ + -, and start with a letter or digit, got {name!r}",
        )
        for name in ("", ".", "..", "../up", "a/b", "/absolute", "a\\b", ".hidden", "-flag", "a b", "a\n", "é", 3)
    ),
    ("deterministic_mode", 1, TypeError, "deterministic_mode must be True or False, got 1"),
    ("progress_bar", None, TypeError, "progress_bar must be True or False, got None"),
    ("save_folder", "s3://bucket/run", ValueError, "save_folder must be a plain path on this machine"),
    ("save_folder", "{run_name}/checkpoints", ValueError, "save_folder must be a plain path on this machine"),
    ("save_folder", 3, TypeError, "save_folder must be a path, got 3"),
    ("load_path", 3, TypeError, "load_path must be a path, got 3"),
    ("algorithms", 3, TypeError, "algorithms must be Algorithm objects, got 3"),
    ("algorithms", [StochasticDepth(), "x"], TypeError, "algorithms must be Algorithm objects, got 'x'"),
    ("algorithms", StochasticDepth, TypeError, "algorithms must be Algorithm objects, got <class"),
    ("optimizers", "sgd", TypeError, "optimizers must be Optimizer objects, got 'sgd'"),
    ("optimizers", [foreign_optimizer(), SGD], TypeError, "optimizers must be Optimizer objects, got <class"),
    (
        "optimizers",
        foreign_optimizer(),
        ValueError,
        "optimizers must hold parameters of the model only, SGD holds 2 of 2",
    ),
    ("schedulers", 3, TypeError, "schedulers must be LRScheduler objects or functions of the state, got 3"),
    (
        "schedulers",
        StepLR(foreign_optimizer(), 1),
        ValueError,
        "schedulers must drive one of the optimizers, StepLR drives another SGD",
    ),
    ("callbacks", 3, TypeError, "callbacks must be Callback objects, got 3"),
    ("callbacks", [Callback(), None], TypeError, "callbacks must be Callback objects, got None"),
    ("loggers", Callback(), TypeError, "loggers must be LoggerDestination objects, got Callback()"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def assert_refused_untouched(model, error, message, here, **changed):
    before, looked = copy.deepcopy(model.state_dict()), looks(model)
    assert before
    with pytest.raises(error, match=re.escape(message)):
        Trainer(**{**arguments(model), **changed})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert looks(model) == looked
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=[f"{bad[0]}={bad[1]!r:.20}" for bad in BAD])
def test_a_bad_argument_is_refused_and_the_model_is_unchanged(name, value, error, message, here):
    assert name in message or name == "device_train_microbatch_size"
    assert_refused_untouched(tiny_resnet(), error, message, here, **{name: value})


def test_good_arguments_let_the_algorithm_change_the_model():
    """Otherwise "unchanged" above would say nothing."""
    model = tiny_resnet()
    looked = looks(model)
    Trainer(**arguments(model))
    assert looks(model) != looked


class TestModel:
    def test_a_model_of_another_type_is_refused(self):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 'resnet'"):
            Trainer("resnet")

    def test_a_module_without_loss_is_refused_and_the_wrap_is_shown(self):
        with pytest.raises(
            TypeError, match=r"must have a method loss\(outputs, batch\), Linear has none.*wrap it"
        ) as caught:
            Trainer(nn.Linear(8, 3))
        wrap = str(caught.value).split("model = ")[1]
        assert wrap == "etude.models.ComposerClassifier(model, num_classes=10)"

    def test_a_loss_that_is_no_method_is_refused(self):
        model: Any = nn.Linear(8, 3)
        model.loss = 0.5
        with pytest.raises(TypeError, match="must have a method loss"):
            Trainer(model)


class TestDevice:
    @pytest.mark.parametrize("device", ["gpu", "cuda", torch.device("cuda"), torch.device("cuda", 1)])
    def test_a_missing_gpu_is_refused(self, device, here, no_gpu):
        message = f"device must be available on this machine, got {device!r}"
        assert_refused_untouched(tiny_resnet(), ValueError, message, here, device=device)

    def test_the_default_without_a_gpu_is_the_cpu(self, no_gpu):
        assert checks.check_device("device", None) == torch.device("cpu")

    def test_a_gpu_is_the_default_if_there_is_one(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert checks.check_device("device", None) == torch.device("cuda")

    @pytest.mark.parametrize("device", ["meta", "xpu"])
    def test_a_device_that_holds_no_data_or_is_not_there_is_refused(self, device, here):
        message = f"device must be available on this machine, got {device!r}"
        assert_refused_untouched(tiny_resnet(), ValueError, message, here, device=device)

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_the_cpu_has_two_names(self, device):
        assert checks.check_device("device", device) == torch.device("cpu")


class TestEvaluationInterval:
    def test_without_evaluation_data_it_is_refused(self, here):
        message = 'eval_interval must come with an eval_dataloader to have an effect, got "1ep"'
        assert_refused_untouched(tiny_resnet(), ValueError, message, here, eval_interval="1ep", eval_dataloader=None)


class TestOptimizers:
    def test_an_optimizer_made_for_another_model_is_refused_with_how_much_is_foreign(self, here):
        model = tiny_resnet()
        mixed = SGD([*model.module[0].parameters(), *LinearModel().parameters(), *nn.Linear(2, 2).parameters()], lr=0.1)
        message = "SGD holds 4 of 6 that are not among those of ComposerClassifier"
        assert_refused_untouched(model, ValueError, message, here, optimizers=mixed)

    def test_one_foreign_optimizer_among_good_ones_is_refused(self, here):
        model = tiny_resnet()
        optimizers = [SGD(model.parameters(), lr=0.1), foreign_optimizer()]
        assert_refused_untouched(model, ValueError, "SGD holds 2 of 2", here, optimizers=optimizers)

    def test_a_scheduler_of_another_optimizer_is_refused(self, here):
        model = tiny_resnet()
        optimizers, other = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
        schedulers = [StepLR(optimizers, 1), StepLR(other, 1)]
        message = "schedulers must drive one of the optimizers, StepLR drives another SGD"
        assert_refused_untouched(model, ValueError, message, here, optimizers=optimizers, schedulers=schedulers)


class TestRunName:
    @pytest.mark.parametrize("name", ["a", "resnet50-20240101-120000", "a.b_c+d", "0", "a..b"])
    def test_a_plain_folder_name_is_accepted(self, name):
        assert checks.check_run_name("run_name", name) == name

    def test_a_folder_with_metrics_is_refused(self, here):
        folder = here / "runs" / "mine"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("{}\n")
        model = tiny_resnet()
        looked = looks(model)
        with pytest.raises(FileExistsError, match=r"must not hold metrics of another run, got .*runs/mine"):
            Trainer(**arguments(model), run_name="mine")
        assert looks(model) == looked
        assert (folder / "metrics.jsonl").read_text() == "{}\n"
        assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


class TestSequences:
    @pytest.mark.parametrize("value", [None, (), []])
    def test_nothing_is_an_empty_tuple(self, value):
        assert checks.as_sequence("callbacks", value, Callback) == ()

    def test_one_object_is_a_tuple_of_one(self):
        callback = Callback()
        assert checks.as_sequence("callbacks", callback, Callback) == (callback,)

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_several_objects_keep_their_order(self, kind):
        callbacks = [Callback(), Callback()]
        assert checks.as_sequence("callbacks", kind(callbacks), Callback) == tuple(callbacks)


@pytest.mark.parametrize("size", [None, 1, 10**6])
def test_good_microbatch_sizes(size):
    assert checks.check_microbatch_size("size", size) == size


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_smallest_and_largest_seed_are_accepted(seed):
    assert checks.check_seed("seed", seed) == seed


def test_a_dataloader_without_length_is_good():
    stream = iter([1, 2])
    assert checks.check_dataloader("train_dataloader", stream) is stream


def test_the_default_interval_is_an_epoch():
    assert checks.check_eval_interval("eval_interval", None) == Time(1, "ep")


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_int_as_duration_counts_epochs(epochs):
    assert checks.check_duration("max_duration", epochs) == Time(epochs, "ep")


class TestSteps:
    def test_a_scheduler_that_needs_a_metric_is_refused(self, here):
        model = tiny_resnet()
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        message = "schedulers must step without a metric, got ReduceLROnPlateau"
        assert_refused_untouched(model, ValueError, message, here, optimizers=optimizer, schedulers=scheduler)

    def test_an_optimizer_that_needs_a_closure_is_refused(self, here):
        model = tiny_resnet()
        message = "optimizers must step without a closure, got LBFGS"
        assert_refused_untouched(model, ValueError, message, here, optimizers=torch.optim.LBFGS(model.parameters()))
