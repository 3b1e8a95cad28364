"""Prints hashes of what short trainings end with: a refactoring must not change one of them.

Compare two checkouts on one machine, with the same torch::

    python benchmarks/same_numbers.py            # in each checkout

Every line is a training of 20 steps through the Trainer, and the SHA-256 of all parameters and buffers at its end:
ResNet-50 with StochasticDepth (block and sample), LabelSmoothing and two loader workers; torchvision's ViT and
`torch.nn.TransformerEncoder`, block and sample.
"""

import hashlib
import os
import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from etude import Trainer
from etude.algorithms import LabelSmoothing, StochasticDepth
from etude.models import ComposerClassifier, composer_resnet

NUM_CLASSES, IMAGE_SIZE, NUM_STEPS = 10, 32, 20


class Encoder(nn.Module):
    """A TransformerEncoder over the rows of an image, and a linear layer on the mean of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(3 * IMAGE_SIZE, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(3 * IMAGE_SIZE, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """The logits ``(N, C)`` of images ``(N, 3, H, W)``."""
        return self.head(self.encoder(images.transpose(1, 2).flatten(2)).mean(1))


def resnet() -> nn.Module:
    """ResNet-50."""
    return composer_resnet("resnet50", num_classes=NUM_CLASSES)


def vit() -> nn.Module:
    """A vision transformer of four small blocks."""
    network = VisionTransformer(
        IMAGE_SIZE, 8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, dropout=0.1, num_classes=NUM_CLASSES
    )
    return ComposerClassifier(network, NUM_CLASSES)


def encoder() -> nn.Module:
    """Torch's TransformerEncoder."""
    return ComposerClassifier(Encoder(), NUM_CLASSES)


def train(model: nn.Module, method: str) -> str:
    """The hash of a model after its training."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(48, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    data = TensorDataset(images, torch.randint(0, NUM_CLASSES, (48,), generator=generator))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    trainer = Trainer(
        model,
        DataLoader(data, batch_size=8, shuffle=True, num_workers=2),
        DataLoader(data, batch_size=8),
        max_duration=f"{NUM_STEPS}ba",
        algorithms=[
            StochasticDepth(stochastic_method=method, drop_rate=0.5, drop_warmup="0.25dur"),  # type: ignore[arg-type]
            LabelSmoothing(0.1),
        ],
        optimizers=optimizer,
        schedulers=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS),
        step_schedulers_every_batch=True,
        progress_bar=False,
        device="cpu",
        seed=17,
    )
    trainer.fit()
    trainer.close()
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Print one line per training."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for build in (resnet, vit, encoder):
            for method in ("block", "sample"):
                torch.manual_seed(5)
                print(f"{build.__name__:<8} {method:<7} {train(build(), method)}", flush=True)


if __name__ == "__main__":
    main()
