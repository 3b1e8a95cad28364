"""Buffers whose shape changes during training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from etude import Trainer
from etude.trainer import CheckpointSaver
from helpers.networks import vectors
from helpers.resumable import differences


class Growing(nn.Module):
    """Keeps rows of its latest batches, their mean from the second batch on, and forgets its warning."""

    rows: Tensor
    recent: Tensor

    def __init__(self, width: int = 8, num_rows: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 3)
        self.register_buffer("rows", torch.zeros(num_rows, width))
        self.register_buffer("recent", torch.zeros(0, width), persistent=False)
        self.register_buffer("mean", None)
        self.register_buffer("first", torch.zeros(()))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.training:
            self.mean = None if len(self.rows) == 0 else self.rows.mean()
            self.rows = torch.cat([self.rows, batch[0]])[-10:]
            self.recent = torch.cat([self.recent, batch[0]])[-6:]
            self.first = None
        shift = 0.0 if self.mean is None else self.mean
        return self.linear(batch[0]) + self.rows.sum() + self.recent.sum() + shift

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def make_trainer(model: nn.Module, **settings: Any) -> Trainer:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, vectors(), vectors(8), "2ep", (), optimizer, progress_bar=False, **settings)


def result_of(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(trainer.state.model.state_dict()), dict(trainer.state.model.named_buffers())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_trainer(Growing(), callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)).fit()
    return tmp_path


def test_a_resume_is_bit_exact_from_every_step(saved: Path) -> None:
    whole = make_trainer(Growing())
    whole.fit()
    for path in sorted(saved.glob("*.pt")):
        resumed = make_trainer(Growing(), load_path=path)
        resumed.fit()
        assert differences(result_of(whole), result_of(resumed)) == [], path.name


def test_an_evaluation_alone_uses_the_buffers(saved: Path) -> None:
    resumed = make_trainer(Growing(), load_path=saved / "ep0-ba4.pt")
    alone = Trainer(Growing(), eval_dataloader=vectors(8), load_path=saved / "ep0-ba4.pt", progress_bar=False)
    assert alone.eval() == resumed.eval()


def test_a_model_whose_buffers_are_others_from_the_start_is_refused(saved: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the checkpoint must fit the model, 'rows' has shape \(3, 8\).*got shape \(4, 8\)"
    ):
        make_trainer(Growing(num_rows=3), load_path=saved / "ep0-ba1.pt")
