"""Steps, epochs and durations of a training."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from etude.engine import Algorithm, Event, Time
from etude.models import ComposerClassifier
from helpers.networks import Stream, linear_model, vectors, weights
from helpers.recording import LOSS, At, CPUTrainer, Keep, batch_number


class TestTraining:
    def test_the_loss_falls(self):
        model = linear_model()
        trainer = CPUTrainer(model, vectors(), vectors(), "5ep", optimizers=SGD(model.parameters(), lr=0.5))
        before = trainer.eval()[LOSS]
        trainer.fit()
        assert trainer.state.eval_metrics[LOSS] < 0.9 * before

    def test_a_step_is_what_a_plain_loop_does(self):
        model, plain = linear_model(), linear_model()
        optimizer = SGD(plain.parameters(), lr=0.5, momentum=0.9)
        for _ in range(2):
            for batch in vectors(20, 8):
                optimizer.zero_grad()
                plain.loss(plain(batch), batch).backward()
                optimizer.step()
        CPUTrainer(model, vectors(20, 8), None, "2ep", optimizers=SGD(model.parameters(), lr=0.5, momentum=0.9)).fit()
        assert torch.equal(weights(model), weights(plain))

    def test_the_step_happens_between_the_complete_gradients_and_the_end_of_the_batch(self):
        model = linear_model()
        moments = [
            At(event, lambda state: (weights(state.model), batch_number(state)))
            for event in (Event.BATCH_START, Event.AFTER_TRAIN_BATCH, Event.BATCH_END)
        ]
        CPUTrainer(model, vectors(), None, "1ba", optimizers=SGD(model.parameters(), lr=0.5), callbacks=moments).fit()
        (start, number_at_start), (after, number_after), (end, number_at_end) = (
            moment.answers[0] for moment in moments
        )
        assert torch.equal(start, after)
        assert not torch.equal(after, end)
        assert (number_at_start, number_after, number_at_end) == (0, 0, 1)

    def test_each_batch_starts_without_gradients(self):
        """After a step of size zero, the same batch has the same gradient again and not twice as much."""
        model = linear_model()
        gradients = At(Event.AFTER_TRAIN_BATCH, lambda state: state.model.linear.weight.grad.clone())
        optimizer = SGD(model.parameters(), lr=0.0)
        CPUTrainer(model, vectors(4, 4), None, "2ep", optimizers=optimizer, callbacks=gradients).fit()
        first, second = gradients.answers
        assert first.abs().max() > 0
        assert torch.equal(first, second)

    def test_an_algorithm_may_change_the_loss_and_the_batch(self):
        class Mirror(Algorithm):
            def match(self, event, state):
                return event is Event.BATCH_START

            def apply(self, event, state, logger):
                state.batch = (-state.batch[0], state.batch[1])

        mirrored = [(-inputs, targets) for inputs, targets in vectors()]
        models = linear_model(), linear_model()
        for model, data, algorithms in zip(models, (vectors(), mirrored), (Mirror(), ()), strict=True):
            CPUTrainer(model, data, None, "3ba", algorithms, SGD(model.parameters(), lr=0.5)).fit()
        assert torch.equal(weights(models[0]), weights(models[1]))
        assert not torch.equal(weights(models[0]), weights(linear_model()))

    def test_the_model_is_trained_in_training_mode(self):
        model = linear_model().eval()
        modes = At(Event.BEFORE_FORWARD, lambda state: state.model.training)
        CPUTrainer(model, vectors(), vectors(), "2ep", callbacks=modes).fit()
        assert set(modes.answers) == {True}

    def test_a_part_that_the_user_froze_in_evaluation_mode_stays_so(self):
        model = linear_model()
        model.linear.eval()
        modes = At(Event.BEFORE_FORWARD, lambda state: (state.model.training, state.model.linear.training))
        CPUTrainer(model, vectors(), vectors(), "2ep", eval_interval="4ba", callbacks=modes).fit()
        assert len(modes.answers) == 12
        assert set(modes.answers) == {(True, False)}

    def test_a_dataloader_without_length_trains_and_is_read_again_every_epoch(self):
        trainer = CPUTrainer(linear_model(), DataLoader(Stream(12), 4), None, "2ep")
        trainer.fit()
        assert trainer.state.timestamp.state_dict() == {
            "epoch": 2,
            "batch": 6,
            "sample": 24,
            "batch_in_epoch": 0,
            "sample_in_epoch": 0,
        }

    def test_the_settings_of_the_run_are_logged(self):
        keep = Keep()
        model = linear_model()
        optimizer = SGD(model.parameters(), lr=0.25)
        CPUTrainer(model, vectors(), None, "1ba", optimizers=optimizer, loggers=keep, seed=7).fit()
        (settings,) = keep.settings
        assert settings["seed"] == 7
        assert settings["max_duration"] == "1ba"
        assert settings["model"] == "LinearModel"
        assert settings["optimizers"][0]["name"] == "SGD"
        assert settings["optimizers"][0]["groups"][0]["lr"] == 0.25
        json.dumps(settings)


class TestMicrobatches:
    """20 samples in batches of 8, 8 and 4, for sizes that do and do not divide them."""

    def train(self, size, **arguments):
        model = linear_model()
        optimizer = SGD(model.parameters(), lr=0.5)
        CPUTrainer(
            model,
            vectors(20, 8),
            None,
            "2ep",
            optimizers=optimizer,
            device_train_microbatch_size=size,
            **arguments,
        ).fit()
        return weights(model)

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9])
    def test_train_like_the_whole_batch(self, size):
        whole = self.train(None)
        assert not torch.allclose(whole, weights(linear_model()), atol=1e-2)
        torch.testing.assert_close(self.train(size), whole, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("size", [1, 3, 5, 8])
    def test_log_the_loss_of_the_whole_batch(self, size):
        whole, divided = Keep(), Keep()
        self.train(None, loggers=whole)
        self.train(size, loggers=divided)
        losses = whole.column("loss/train/total")
        assert len(losses) == 6
        assert dict(divided.column("loss/train/total")) == pytest.approx(dict(losses), rel=1e-5)

    def test_tell_their_place_in_the_batch(self):
        places = At(
            Event.BEFORE_FORWARD,
            lambda state: (state.microbatch_start, state.microbatch_num_samples, len(state.batch[0])),
        )
        self.train(3, callbacks=places)
        assert places.answers[:5] == [(0, 3, 3), (3, 3, 3), (6, 2, 2), (0, 3, 3), (3, 3, 3)]

    @pytest.mark.parametrize("size", [None, 8, 20])
    def test_the_undivided_batch_is_its_own_microbatch(self, size):
        places = At(Event.BEFORE_FORWARD, lambda state: (state.microbatch_start, state.microbatch_num_samples))
        self.train(size, callbacks=places)
        assert places.answers == [(0, 8), (0, 8), (0, 4)] * 2

    @pytest.mark.parametrize("event", [Event.BATCH_START, Event.AFTER_TRAIN_BATCH, Event.BATCH_END])
    def test_the_whole_batch_is_at_hand_around_them(self, event):
        rows = At(event, lambda state: (len(state.batch[0]), state.batch_num_samples))
        self.train(3, callbacks=rows)
        assert rows.answers == [(8, 8), (8, 8), (4, 4)] * 2

    def test_the_loss_at_hand_is_not_scaled(self):
        """State.loss is the mean over the microbatch; the share in the batch comes in at backward."""
        losses = At(Event.AFTER_BACKWARD, lambda state: (state.loss, state.model.loss(state.outputs, state.batch)))
        self.train(3, callbacks=losses)
        assert len(losses.answers) == 16
        assert all(torch.equal(kept, again) for kept, again in losses.answers)


class TestDuration:
    """24 samples in 6 batches of 4."""

    @pytest.mark.parametrize(
        ("max_duration", "num_batches", "num_epochs"),
        [
            ("1ep", 6, 1),
            ("2ep", 12, 2),
            ("1ba", 1, 0),
            ("5ba", 5, 0),
            ("6ba", 6, 1),
            ("7ba", 7, 1),
            ("12ba", 12, 2),
            ("1sp", 1, 0),
            ("20sp", 5, 0),
            ("21sp", 6, 1),
            ("24sp", 6, 1),
            ("25sp", 7, 1),
            (Time(9, "ba"), 9, 1),
        ],
    )
    def test_training_ends_at_the_batch_that_reaches_it(self, max_duration, num_batches, num_epochs):
        ends, checkpoints = At(Event.EPOCH_END, batch_number), At(Event.EPOCH_CHECKPOINT, batch_number)
        batches, fits = At(Event.BATCH_CHECKPOINT, batch_number), At(Event.FIT_END, batch_number)
        trainer = CPUTrainer(
            linear_model(), vectors(24, 4), None, max_duration, callbacks=[ends, checkpoints, batches, fits]
        )
        trainer.fit()
        assert batches.answers == list(range(1, num_batches + 1))
        assert ends.answers == checkpoints.answers == [6 * epoch for epoch in range(1, num_epochs + 1)]
        assert fits.answers == [num_batches]
        in_epoch = num_batches - 6 * num_epochs
        assert trainer.state.timestamp.state_dict() == {
            "epoch": num_epochs,
            "batch": num_batches,
            "sample": 4 * num_batches,
            "batch_in_epoch": in_epoch,
            "sample_in_epoch": 4 * in_epoch,
        }

    def test_samples_are_counted_by_the_rows_of_each_batch(self):
        trainer = CPUTrainer(linear_model(), vectors(22, 4), None, "2ep")
        trainer.fit()
        assert trainer.state.timestamp.sample == 44

    def test_nothing_is_left_to_fit_afterwards(self):
        trainer = CPUTrainer(linear_model(), vectors(), None, "3ba")
        trainer.fit()
        trained = weights(trainer.state.model)
        with pytest.raises(RuntimeError, match='max_duration="3ba" is reached, there is nothing left to train'):
            trainer.fit()
        assert torch.equal(weights(trainer.state.model), trained)

    def test_a_longer_duration_continues(self):
        trainer = CPUTrainer(linear_model(), vectors(24, 4), None, "1ep")
        trainer.fit()
        trainer.state.max_duration = Time(2, "ep")
        trainer.fit()
        assert trainer.state.timestamp.batch == 12


class ReplaceParameters(Algorithm):
    def match(self, event, state):
        return event is Event.INIT

    def apply(self, event, state, logger):
        state.model.linear = nn.Linear(8, 3)


class TestOptimizers:
    def test_the_default_is_announced(self, caplog):
        with caplog.at_level(logging.WARNING):
            trainer = CPUTrainer(linear_model(), vectors(), None, "1ep")
        (optimizer,) = trainer.state.optimizers
        assert type(optimizer) is torch.optim.AdamW
        (record,) = caplog.records
        assert record.name.startswith("etude")
        message = record.getMessage()
        assert "no optimizers were given" in message
        assert f"AdamW(lr={optimizer.defaults['lr']:g}, weight_decay={optimizer.defaults['weight_decay']:g})" in message

    def test_the_default_trains_every_parameter(self):
        model = linear_model()
        before = weights(model)
        CPUTrainer(model, vectors(), None, "2ep").fit()
        assert (weights(model) != before).all()

    def test_nothing_is_logged_with_an_optimizer_or_without_training_data(self, caplog):
        model = linear_model()
        given = CPUTrainer(model, vectors(), None, "1ep", optimizers=SGD(model.parameters(), lr=0.1))
        untrained = CPUTrainer(model, eval_dataloader=vectors())
        assert caplog.records == []
        assert len(given.state.optimizers) == 1
        assert len(untrained.state.optimizers) == 0

    def test_a_given_optimizer_is_used_and_no_other(self):
        model = linear_model()
        before = weights(model)
        optimizer = SGD(model.parameters(), lr=0.0)
        trainer = CPUTrainer(model, vectors(), None, "1ep", optimizers=optimizer)
        trainer.fit()
        assert trainer.state.optimizers == (optimizer,)
        assert torch.equal(weights(model), before)

    def test_all_given_optimizers_step(self):
        model, plain = linear_model(), linear_model()
        optimizers = [SGD([model.linear.weight], lr=0.5), SGD([model.linear.bias], lr=0.5)]
        CPUTrainer(model, vectors(), None, "1ep", optimizers=optimizers).fit()
        CPUTrainer(plain, vectors(), None, "1ep", optimizers=SGD(plain.parameters(), lr=0.5)).fit()
        assert torch.equal(weights(model), weights(plain))

    def test_an_algorithm_that_replaces_parameters_under_an_optimizer_is_refused(self):
        model = linear_model()
        optimizer = SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="optimizers must hold parameters of the model only, SGD holds 2 of 2"):
            CPUTrainer(model, vectors(), None, "1ep", ReplaceParameters(), optimizer)

    def test_the_default_optimizer_is_made_after_the_algorithms_changed_the_model(self):
        model = linear_model()
        trainer = CPUTrainer(model, vectors(), None, "1ep", ReplaceParameters())
        before = weights(model)
        trainer.fit()
        assert (weights(model) != before).all()


class TestSchedulers:
    """2 epochs of 3 batches, the rate halves at each step of the scheduler."""

    def rates(self, max_duration="2ep", **arguments):
        model, keep = linear_model(), Keep()
        optimizer = SGD(model.parameters(), lr=1.0)
        used = At(Event.AFTER_TRAIN_BATCH, lambda state: optimizer.param_groups[0]["lr"])
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        CPUTrainer(
            model,
            vectors(12, 4),
            None,
            max_duration,
            (),
            optimizer,
            scheduler,
            callbacks=used,
            loggers=keep,
            **arguments,
        ).fit()
        return used.answers, [rate for _, rate in keep.column("lr")], optimizer.param_groups[0]["lr"]

    def test_they_step_every_epoch(self):
        used, logged, finally_ = self.rates()
        assert used == logged == [1.0] * 3 + [0.5] * 3
        assert finally_ == 0.25

    def test_they_step_every_batch_if_configured(self):
        used, logged, finally_ = self.rates(step_schedulers_every_batch=True)
        assert used == logged == [0.5**batch for batch in range(6)]
        assert finally_ == 0.5**6

    def test_an_incomplete_epoch_is_no_step(self):
        used, logged, finally_ = self.rates(max_duration="5ba")
        assert used == logged == [1.0] * 3 + [0.5] * 2
        assert finally_ == 0.5


class TestSeed:
    def train(self, seed):
        network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
        model = ComposerClassifier(network, 3)
        optimizer = SGD(model.parameters(), lr=0.5)
        CPUTrainer(model, vectors(shuffle=True), None, "2ep", optimizers=optimizer, seed=seed).fit()
        return weights(model)

    def test_one_seed_makes_two_runs_identical_to_the_bit(self):
        first = self.train(seed=3)
        torch.rand(5)
        assert torch.equal(self.train(seed=3), first)

    def test_another_seed_is_another_run(self):
        assert not torch.equal(self.train(seed=3), self.train(seed=4))

    @pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
    @pytest.mark.parametrize(
        "draw",
        [random.random, np.random.random_sample, lambda: torch.rand(()).item()],
        ids=["python", "numpy", "torch"],
    )
    def test_every_generator_is_seeded(self, draw, seed):
        draws = []
        for _ in range(2):
            CPUTrainer(linear_model(), seed=seed)
            draws.append(draw())
        assert draws[0] == draws[1]

    def test_deterministic_mode_asks_for_deterministic_kernels(self):
        before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        try:
            torch.use_deterministic_algorithms(False)
            CPUTrainer(linear_model())
            assert not torch.are_deterministic_algorithms_enabled()
            CPUTrainer(linear_model(), deterministic_mode=True)
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
