"""When the model is evaluated and what that measures."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from etude.engine import Event, Time
from helpers.networks import Stream, classifier, linear_model, tiny_resnet, vectors
from helpers.recording import LOSS, At, CPUTrainer, Keep, batch_number, raising


class TestEvaluationInterval:
    """6 batches per epoch."""

    @pytest.mark.parametrize(
        ("max_duration", "interval", "evaluated_at"),
        [
            ("3ep", None, [6, 12, 18]),
            ("3ep", "1ep", [6, 12, 18]),
            ("3ep", "2ep", [12, 18]),
            ("4ep", Time(2, "ep"), [12, 24]),
            ("1ep", "5ep", [6]),
            ("2ep", "4ba", [4, 8, 12]),
            ("2ep", "5ba", [5, 10, 12]),
            ("1ep", "1ba", [1, 2, 3, 4, 5, 6]),
            ("8ba", "1ep", [6, 8]),
            ("8ba", "4ba", [4, 8]),
            ("8ba", "100ba", [8]),
            ("30sp", "3ba", [3, 6, 8]),
        ],
    )
    def test_evaluation_happens_when_it_is_due_and_at_the_end(self, max_duration, interval, evaluated_at):
        starts = At(Event.EVAL_START, batch_number)
        CPUTrainer(
            linear_model(), vectors(24, 4), vectors(8, 4), max_duration, eval_interval=interval, callbacks=starts
        ).fit()
        assert starts.answers == evaluated_at

    def test_without_evaluation_data_training_does_without(self):
        starts, ends = At(Event.EVAL_START, batch_number), At(Event.FIT_END, batch_number)
        CPUTrainer(linear_model(), vectors(), None, "1ep", callbacks=[starts, ends]).fit()
        assert starts.answers == []
        assert ends.answers == [6]

    def test_results_are_logged_under_the_number_of_finished_batches(self):
        keep = Keep()
        CPUTrainer(linear_model(), vectors(24, 4), vectors(8, 4), "9ba", loggers=keep).fit()
        assert [step for step, _ in keep.column(LOSS)] == [6, 9]


class TestEvaluation:
    def test_loss_and_metrics_are_those_of_all_samples_together(self):
        """22 samples in batches of 4, the last one of 2: a mean of the batch means would be another number."""
        model, loader = classifier(), vectors(22, 4)
        inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        logits = model.module(inputs)
        results = CPUTrainer(model, eval_dataloader=loader).eval()
        mean_of_means = np.mean([model.loss(model(batch), batch).item() for batch in loader])
        assert set(results) == {LOSS, "metrics/eval/MulticlassAccuracy"}
        assert results[LOSS] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
        assert results[LOSS] != pytest.approx(mean_of_means, rel=1e-4)
        accuracy = float((logits.argmax(1) == targets).float().mean())
        assert 0 < accuracy < 1
        assert results["metrics/eval/MulticlassAccuracy"] == pytest.approx(accuracy)

    def test_a_model_without_metrics_gets_its_loss_only(self):
        assert set(CPUTrainer(linear_model(), eval_dataloader=vectors()).eval()) == {LOSS}

    def test_each_evaluation_begins_anew(self):
        trainer = CPUTrainer(classifier(), eval_dataloader=vectors(22, 4))
        assert trainer.eval() == trainer.eval()

    def test_the_model_is_in_evaluation_mode_and_needs_no_gradient(self):
        modes = At(
            Event.EVAL_AFTER_FORWARD,
            lambda state: ({module.training for module in state.model.modules()}, state.outputs.requires_grad),
        )
        CPUTrainer(linear_model(), vectors(), vectors(8, 4), "1ep", callbacks=modes).fit()
        assert modes.answers == [({False}, False)] * 2

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("frozen", [True, False])
    def test_every_module_comes_back_in_its_own_mode(self, training, frozen):
        model = tiny_resnet().train(training)
        if frozen:
            model.module[2].train(not training)
        before = [module.training for module in model.modules()]
        images = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]
        CPUTrainer(model, eval_dataloader=images).eval()
        assert [module.training for module in model.modules()] == before

    def test_every_module_comes_back_in_its_own_mode_after_an_exception(self):
        model = linear_model()
        model.linear.eval()
        trainer = CPUTrainer(model, eval_dataloader=vectors(), callbacks=raising(Event.EVAL_END, OSError("full")))
        with pytest.raises(OSError, match="full"):
            trainer.eval()
        assert (model.training, model.linear.training) == (True, False)

    def test_it_changes_no_weights(self):
        model = tiny_resnet()
        before = copy.deepcopy(model.state_dict())
        images = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]
        CPUTrainer(model, eval_dataloader=images).eval()
        assert before
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_without_data_it_is_refused(self):
        with pytest.raises(ValueError, match="eval_dataloader must be given to evaluate, got None"):
            CPUTrainer(linear_model(), vectors(), None, "1ep").eval()

    def test_no_batches_are_refused(self):
        with pytest.raises(ValueError, match="eval_dataloader must yield at least one batch, it yielded none"):
            CPUTrainer(linear_model(), eval_dataloader=DataLoader(Stream(0), 4)).eval()
