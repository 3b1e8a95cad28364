"""Training on image folders: augmentation does not depend on loader workers or resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from etude import Trainer
from etude.datasets import image_folder_dataloaders
from etude.models import ComposerClassifier
from helpers.image_writing import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", {"ant": 8, "bee": 8})


def make_trainer(folder: Path, num_workers: int, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    data = image_folder_dataloaders(folder, 4, 16, num_workers)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, data.num_classes))
    return Trainer(
        ComposerClassifier(network, data.num_classes),
        data.train_dataloader,
        data.eval_dataloader,
        "2ep",
        optimizers=SGD(network.parameters(), lr=0.1),
        device="cpu",
        progress_bar=False,
        **settings,
    )


def fit(trainer: Trainer) -> dict[str, Tensor]:
    trainer.fit()
    trainer.close()
    return {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_and_a_resume_in_the_middle_of_an_epoch_change_nothing(folder: Path, tmp_path: Path) -> None:
    expected = fit(make_trainer(folder, 0, save_folder=tmp_path / "saved", save_interval="1ba",
                                save_num_checkpoints_to_keep=-1))  # fmt: skip
    found = fit(make_trainer(folder, 2, load_path=tmp_path / "saved" / "ep1-ba4.pt"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
