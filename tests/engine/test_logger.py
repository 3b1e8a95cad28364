"""The logger and its destinations."""

import pytest
import torch
from torch import nn

from etude.engine import Engine, Event, Logger, LoggerDestination, State, Timestamp


class Keep(LoggerDestination):
    def __init__(self):
        self.kept = []

    def log_hyperparameters(self, hyperparameters):
        self.kept.append(hyperparameters)

    def log_metrics(self, metrics, step):
        self.kept.append((metrics, step))


def test_every_destination_gets_metrics_with_the_number_of_finished_batches():
    destinations = [Keep(), Keep()]
    state = State(model=nn.Identity())
    logger = Logger(state, destinations)
    logger.log_metrics({"loss": 0.5})
    state.timestamp = Timestamp(epoch=1, batch=7, sample=28, batch_in_epoch=2, sample_in_epoch=8)
    logger.log_metrics({"loss": 0.25})
    for destination in destinations:
        assert destination.kept == [({"loss": 0.5}, 0), ({"loss": 0.25}, 7)]


def test_every_destination_gets_hyperparameters():
    destinations = [Keep(), Keep()]
    Logger(State(model=nn.Identity()), destinations).log_hyperparameters({"lr": 0.1})
    assert [destination.kept for destination in destinations] == [[{"lr": 0.1}], [{"lr": 0.1}]]


def test_tensors_are_handed_on_unread():
    destination, value = Keep(), torch.tensor(0.5)
    Logger(State(model=nn.Identity()), [destination]).log_metrics({"loss": value})
    assert destination.kept[0][0]["loss"] is value


def test_without_destinations_nothing_happens():
    logger = Logger(State(model=nn.Identity()))
    logger.log_metrics({"loss": 0.5})
    logger.log_hyperparameters({})
    assert logger.destinations == ()


def test_a_plain_destination_keeps_nothing_and_takes_everything():
    destination = LoggerDestination()
    assert destination.log_metrics({"loss": 0.5}, 0) is None
    assert destination.log_hyperparameters({"lr": 0.1}) is None


def test_from_after_dataloader_on_metrics_belong_to_the_batch_that_was_read() -> None:
    destination = Keep()
    state = State(model=nn.Identity())
    logger = Logger(state, [destination])
    engine = Engine(state, logger)
    for event in (Event.FIT_START, Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.AFTER_TRAIN_BATCH):
        engine.run_event(event)
        logger.log_metrics({event.value: 0})
    state.timestamp = state.timestamp.to_next_batch(4)
    for event in (Event.BATCH_END, Event.BEFORE_DATALOADER, Event.EPOCH_END):
        engine.run_event(event)
        logger.log_metrics({event.value: 0})
    engine.run_event(Event.AFTER_DATALOADER)
    logger.log_metrics({"after_dataloader": 0})
    assert [(*metrics, step) for metrics, step in destination.kept] == [
        ("fit_start", 0),
        ("before_dataloader", 0),
        ("after_dataloader", 1),
        ("after_train_batch", 1),
        ("batch_end", 1),
        ("before_dataloader", 1),
        ("epoch_end", 1),
        ("after_dataloader", 2),
    ]


def test_a_metric_with_more_than_one_element_is_refused_by_name() -> None:
    destination = Keep()
    with pytest.raises(ValueError, match=r"a metric must be a number, 'matrix' is a tensor of shape \(2, 2\)"):
        Logger(State(model=nn.Identity()), [destination]).log_metrics({"matrix": torch.zeros(2, 2)})
    assert destination.kept == []
