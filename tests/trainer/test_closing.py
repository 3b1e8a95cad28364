"""The end of a training: closing of loggers and callbacks, written files, bad data."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from etude.engine import Callback, Event
from helpers.networks import Stream, classifier, linear_model, vectors, weights
from helpers.recording import LOSS, CPUTrainer, raising


class Closing(Callback):
    def __init__(self, error=None):
        self.error, self.num_closed = error, 0

    def close(self, state, logger):
        self.num_closed += 1
        if self.error is not None:
            raise self.error


class TestClosing:
    @pytest.mark.parametrize("event", [Event.FIT_START, Event.AFTER_LOSS, Event.EVAL_END, Event.FIT_END])
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("enough")], ids=["error", "interrupt"])
    def test_an_exception_in_fit_closes_everything_and_is_passed_on(self, error, event):
        closings = [Closing(), Closing()]
        callbacks = [closings[0], raising(event, error), closings[1]]
        trainer = CPUTrainer(linear_model(), vectors(), vectors(), "1ep", callbacks=callbacks)
        with pytest.raises(type(error)) as caught:
            trainer.fit()
        assert caught.value is error
        assert [closing.num_closed for closing in closings] == [1, 1]
        with pytest.raises(RuntimeError, match="closed"):
            trainer.fit()

    def test_a_failure_to_close_does_not_hide_the_exception(self):
        error = OSError("disk full")
        last = Closing()
        callbacks = [Closing(ValueError("jammed")), raising(Event.AFTER_LOSS, error), last]
        trainer = CPUTrainer(linear_model(), vectors(), None, "1ep", callbacks=callbacks)
        with pytest.raises(OSError, match="disk full") as caught:
            trainer.fit()
        assert caught.value is error
        assert any("jammed" in note for note in caught.value.__notes__)
        assert last.num_closed == 1

    def test_fit_leaves_open_what_close_closes_once(self):
        closing = Closing()
        trainer = CPUTrainer(linear_model(), vectors(), None, "1ba", callbacks=closing)
        trainer.fit()
        assert closing.num_closed == 0
        trainer.close()
        trainer.close()
        assert closing.num_closed == 1

    def test_close_reports_what_failed_to_close(self):
        trainer = CPUTrainer(linear_model(), callbacks=Closing(ValueError("jammed")))
        with pytest.raises(ExceptionGroup, match="callbacks failed to close") as caught:
            trainer.close()
        assert [str(error) for error in caught.value.exceptions] == ["jammed"]

    @pytest.mark.parametrize("action", ["fit", "eval"])
    def test_a_closed_trainer_refuses(self, action):
        trainer = CPUTrainer(linear_model(), vectors(), vectors(), "1ep")
        trainer.close()
        with pytest.raises(RuntimeError, match=f"the Trainer is closed and cannot {action} any more: build a new one"):
            getattr(trainer, action)()
        assert trainer.state.timestamp.batch == 0

    def test_evaluation_is_possible_after_fit(self):
        trainer = CPUTrainer(linear_model(), vectors(), vectors(), "1ep")
        trainer.fit()
        assert trainer.eval() == trainer.state.eval_metrics


class TestBadData:
    def test_fit_without_data_is_refused(self):
        with pytest.raises(ValueError, match="train_dataloader must be given to fit, got None"):
            CPUTrainer(linear_model(), eval_dataloader=vectors()).fit()

    def test_a_stream_without_batches_is_refused(self):
        with pytest.raises(
            ValueError, match="train_dataloader must yield at least one batch per epoch, it yielded none"
        ):
            CPUTrainer(linear_model(), DataLoader(Stream(0), 4), None, "1ep").fit()

    def test_a_generator_that_is_exhausted_after_one_epoch_is_refused(self):
        trainer = CPUTrainer(linear_model(), iter(list(vectors(8, 4))), None, "2ep")
        with pytest.raises(ValueError, match="must yield at least one batch per epoch, it yielded none"):
            trainer.fit()
        assert trainer.state.timestamp.batch == 2

    @pytest.mark.parametrize(
        ("batch", "got"),
        [
            (torch.zeros(4, 8), "a Tensor"),
            ({"inputs": torch.zeros(4, 8), "targets": torch.zeros(4).long()}, "a dict"),
            ((torch.zeros(4, 8),), "a tuple of 1"),
            ([torch.zeros(4, 8), torch.zeros(4).long(), torch.zeros(4)], "a list of 3"),
        ],
        ids=["tensor", "dict", "one", "three"],
    )
    @pytest.mark.parametrize("action", ["fit", "eval"])
    def test_a_classifier_takes_pairs_only(self, batch, got, action):
        model = classifier()
        before = weights(model)
        trainer = CPUTrainer(model, [batch], [batch], "1ep")
        with pytest.raises(ValueError, match=rf"a batch must be a pair \(inputs, targets\), got {got}"):
            getattr(trainer, action)()
        assert torch.equal(weights(model), before)

    @pytest.mark.parametrize("batch", ["text", None, (1, 2), {"x": [1]}], ids=["text", "none", "numbers", "dict"])
    def test_a_batch_without_tensors_is_refused(self, batch):
        with pytest.raises(ValueError, match=f"a batch must be .* got a {type(batch).__name__} without tensors$"):
            CPUTrainer(linear_model(), [batch], None, "1ep").fit()

    def test_a_batch_of_unequal_rows_is_refused(self):
        batch = torch.zeros(4, 8), torch.zeros(3).long()
        with pytest.raises(ValueError, match=r"must have the same first dimension, got .*\(4, 8\), .*\(3,\)"):
            CPUTrainer(linear_model(), [batch], None, "1ep").fit()

    @pytest.mark.parametrize(
        ("make", "got"),
        [
            (lambda loss: loss.expand(4), r"a tensor of shape \(4,\)"),
            (lambda loss: loss[None, None], r"a tensor of shape \(1, 1\)"),
            (lambda loss: 0.5, r"0\.5"),
            (lambda loss: None, "None"),
        ],
        ids=["vector", "matrix", "float", "none"],
    )
    def test_a_loss_that_is_no_scalar_is_refused(self, make, got):
        model = linear_model()
        before = weights(model)
        plain = model.loss
        model.loss = lambda outputs, batch: make(plain(outputs, batch))  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=f"model.loss must return a tensor without dimensions, .*got {got}"):
            CPUTrainer(model, vectors(), None, "1ep").fit()
        assert torch.equal(weights(model), before)


class TestFiles:
    def test_a_named_run_writes_its_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trainer = CPUTrainer(linear_model(), vectors(24, 4), vectors(8, 4), "1ep", run_name="mine")
        assert list(tmp_path.iterdir()) == []
        trainer.fit()
        trainer.close()
        files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {f"runs/mine/{name}" for name in ("metrics.jsonl", "metrics.csv", "settings.json")}
        rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 7))
        assert LOSS in rows[-1]

    def test_a_run_without_name_writes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trainer = CPUTrainer(linear_model(), vectors(), vectors(), "1ep")
        trainer.fit()
        trainer.close()
        assert list(tmp_path.iterdir()) == []
