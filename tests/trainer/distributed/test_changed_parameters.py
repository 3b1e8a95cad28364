"""Parameters that are unfrozen, added or replaced during training on two ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, RandomSampler

import etude.functional as cf
from etude import Algorithm, Callback, Event, Trainer
from helpers.networks import LinearModel, images, vectors
from helpers.parallel_training import (
    OnOneRank,
    assert_same_on_all_ranks,
    largest_difference,
    make_model,
    refused,
    train,
)
from helpers.ranks import on_ranks


class At(Algorithm):
    """Does something at one event of one step, or of all."""

    def __init__(self, event: Event, action: Callable[[Any], None], step: int | None = None) -> None:
        self.event, self.action, self.step = event, action, step

    def __repr__(self) -> str:
        return f"At({self.event.name}, {self.step})"

    def match(self, event: Event, state: Any) -> bool:
        return event is self.event and self.step in (None, state.timestamp.batch)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self.action(state)


class Stages(nn.Module):
    """Three layers in double precision, so that several ranks equal one up to rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.head = (nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
        self.added: nn.Module = nn.Identity()
        self.double()

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.added(self.second(self.first(batch[0].double()).tanh()).tanh()))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def freeze(state: Any) -> None:
    state.model.first.requires_grad_(False)


def unfreeze(state: Any) -> None:
    state.model.first.requires_grad_(True)


def add_layer(state: Any) -> None:
    layer = nn.Linear(8, 8, dtype=torch.float64)
    nn.init.constant_(layer.weight, 0.1 if state.rank == 0 else 0.2)  # the ranks do not agree
    nn.init.constant_(layer.bias, 0.0)
    state.model.added = layer
    state.optimizers[0].add_param_group({"params": list(layer.parameters())})


def replace_head(state: Any) -> None:
    head = nn.Linear(8, 3, dtype=torch.float64)
    nn.init.constant_(head.weight, 0.1)
    nn.init.constant_(head.bias, 0.0)
    state.model.head = head
    state.optimizers[0].param_groups[0]["params"] = list(state.model.parameters())


CHANGES: dict[str, list[tuple[Event, Callable[[Any], None], int | None]]] = {
    "unfrozen": [(Event.INIT, freeze, None), (Event.BATCH_START, unfreeze, 2)],
    "unfrozen and frozen again": [
        (Event.INIT, freeze, None),
        (Event.BATCH_END, unfreeze, 2),
        (Event.BATCH_START, freeze, 4),
    ],
    "added": [(Event.BATCH_START, add_layer, 2)],
    "replaced": [(Event.EPOCH_START, replace_head, 6)],
}


@on_ranks(2)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_parameters_that_change_on_all_ranks_are_averaged(change: str, microbatch_size: int | None) -> None:
    model = Stages()
    algorithms = [At(event, action, step) for event, action, step in CHANGES[change]]
    train(model, vectors(), "9ba", *algorithms, device_train_microbatch_size=microbatch_size)
    assert_same_on_all_ranks(model)
    alone = train_alone(change)
    assert largest_difference(model, alone) < 1e-12
    assert largest_difference(model.second, Stages().second) > 1e-2


def train_alone(change: str) -> nn.Module:
    """The same by hand on the joined batches."""
    model = Stages()

    class FakeState:
        rank = 0

    state: Any = FakeState()
    state.model = model
    state.optimizers = [SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)]
    for event, action, _ in CHANGES[change]:
        if event is Event.INIT:
            action(state)
    for step, batch in enumerate([*vectors(), *vectors()][:9]):
        for _, action, at in CHANGES[change]:
            if step == at:
                action(state)
        state.optimizers[0].zero_grad()
        model.loss(model(batch), batch).backward()
        state.optimizers[0].step()
    return model


@on_ranks(2)
def test_parameters_that_change_on_one_rank_raise_before_the_update() -> None:
    model = Stages()
    before: list[Any] = []
    keep = At(Event.BATCH_START, lambda state: before.append(model.second.weight.detach().clone()), 3)
    with refused("all ranks must train the same parameters, but those that require a gradient on ranks [1]"):
        train(model, vectors(), "6ba", At(Event.INIT, freeze), keep, OnOneRank(Event.BATCH_START, 3, unfreeze))
    assert model.second.weight.equal(before[0])


@on_ranks(2)
@pytest.mark.parametrize("fused", [False, True])
def test_different_batches_are_named_before_the_next_update(fused: bool) -> None:
    data = vectors().dataset
    generator = torch.Generator().manual_seed(dist.get_rank())

    class Unseeded(RandomSampler):
        def __iter__(self) -> Any:
            return iter(torch.randperm(24, generator=generator).tolist())

    model = LinearModel()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    dataloader = DataLoader(data, 4, sampler=Unseeded(data))
    trainer = Trainer(model, dataloader, None, "3ba", (), optimizer, progress_bar=False)
    with refused("all ranks must list the same batches, but those of ranks [1] are not those of rank 0 in step 0"):
        trainer.fit()
    assert optimizer.state_dict()["state"] == {}, "no update was applied"
    assert_same_on_all_ranks(model)


@on_ranks(2)
@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_weights_that_differ_are_named_before_they_are_used(moment: str, tmp_path: Any) -> None:
    def change(state: Any) -> None:
        with torch.no_grad():
            state.model.linear.bias[0] += 1e-6

    model = LinearModel()
    settings: dict[str, Any] = {"save_folder": tmp_path, "save_interval": "1ba"} if moment == "save" else {}
    eval_dataloader = vectors() if moment == "evaluation" else None
    trainer = Trainer(
        model,
        vectors(),
        eval_dataloader,
        "6ba",
        OnOneRank(Event.BATCH_END, 4, change),
        SGD(model.parameters(), lr=0.1),
        progress_bar=False,
        **settings,
    )
    with refused("all ranks must have the same weights, but after step"):
        trainer.fit()
    if moment == "save":
        assert (tmp_path / "latest").read_text() == "ep0-ba3.pt\n"


def shorten_gradients(state: Any) -> None:
    for parameter in state.model.parameters():
        parameter.grad.div_(parameter.grad.norm() + 1)


def replace_gradients(state: Any) -> None:
    for parameter in state.model.parameters():
        parameter.grad = parameter.grad / (parameter.grad.norm() + 1)


EDITS = {"in place": shorten_gradients, "replaced": replace_gradients}


@on_ranks(2)
@pytest.mark.parametrize("how", EDITS)
def test_gradients_changed_at_after_backward_are_those_of_one_rank(how: str) -> None:
    model, alone = Stages(), Stages()
    train(model, vectors(), "8ba", At(Event.AFTER_BACKWARD, EDITS[how]))
    assert_same_on_all_ranks(model)
    optimizer = SGD(alone.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for batch in [*vectors(), *vectors()][:8]:
        optimizer.zero_grad()
        alone.loss(alone(batch), batch).backward()
        with torch.no_grad():
            for parameter in alone.parameters():
                assert parameter.grad is not None
                parameter.grad.div_(parameter.grad.norm() + 1)
        optimizer.step()
    assert largest_difference(model, alone) < 1e-12


@on_ranks(2)
@pytest.mark.parametrize("microbatch_size", [1, "auto"])
@pytest.mark.parametrize("how", EDITS)
def test_gradients_changed_before_they_are_averaged_are_refused(how: str, microbatch_size: Any) -> None:
    model = Stages()
    with refused("gradients must not be changed at AFTER_BACKWARD on several ranks before they are averaged"):
        train(
            model, vectors(), "2ba", At(Event.AFTER_BACKWARD, EDITS[how]), device_train_microbatch_size=microbatch_size
        )
    assert largest_difference(model, Stages()) == 0.0


@on_ranks(2)
@pytest.mark.parametrize("event", [Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH])
def test_a_second_backward_is_refused(event: Event) -> None:
    def again(state: Any) -> None:
        state.model.loss(state.model(state.batch), state.batch).backward()

    with refused("a backward pass after the gradients of the step were averaged over the ranks"):
        train(Stages(), vectors(), "2ba", At(event, again))


@on_ranks(2)
def test_a_backward_between_steps_is_allowed() -> None:
    def own(state: Any) -> None:
        state.model.loss(state.model(state.batch), state.batch).backward()

    model = Stages()
    train(model, vectors(), "4ba", At(Event.BATCH_END, own))
    assert_same_on_all_ranks(model)


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(3, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.embedding(batch[1]))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


@on_ranks(2)
def test_sparse_gradients_are_refused_by_name() -> None:
    model = Words()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, vectors(), None, "2ba", (), optimizer, progress_bar=False)
    with refused("gradients must be dense to be averaged over ranks, got a sparse one for 'embedding.weight'"):
        trainer.fit()
    assert model.embedding.weight.equal(Words().embedding.weight)


@on_ranks(2)
@pytest.mark.parametrize("settings", [{"parallelism": "fsdp"}, {"sync_batchnorm": True}], ids=str)
def test_a_model_whose_ranks_may_differ_is_refused_whoever_converted_it(settings: dict[str, Any]) -> None:
    model = cf.apply_stochastic_depth(make_model(), use_same_gpu_seed=False)
    with refused("needs all ranks to compute the same"):
        train(model, images(), "2ba", **settings)


@on_ranks(2)
def test_a_model_whose_ranks_may_differ_is_averaged_whoever_converted_it() -> None:
    model = cf.apply_stochastic_depth(make_model(), use_same_gpu_seed=False, drop_rate=0.6)
    train(model, images(num_samples=40), "20ba")
    assert_same_on_all_ranks(model)


@on_ranks(2)
def test_fsdp_refuses_parameters_that_are_added_later() -> None:
    class AddLayer(Callback):
        def epoch_start(self, state: Any, logger: Any) -> None:
            state.model.more = nn.Linear(2, 2)

    with refused("parallelism='fsdp' shards the parameters that the model has after INIT, got 'more.weight' later"):
        train(make_model(), images(), "2ba", parallelism="fsdp", callbacks=AddLayer())
