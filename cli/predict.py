"""``etude predict``: the classes of single images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def predict(
    run: str,
    images: tuple[str, ...],
    top_k: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> None:
    """Predict the classes of images with the network of a finished run.

    Args:
        run: The folder of the run, such as runs/resnet50-20260101-120000.
        images: Files of images, or folders of them.
        top_k: How many classes to name for each image, the most probable first.
        batch_size: Images per batch.
        num_workers: Processes that load the images.
        device: cpu, gpu or a torch device; by default the GPU where there is one.
        output: A JSON file to write the predictions to.
    """
    from .trained import load_trained

    if output is not None and not Path(output).absolute().parent.is_dir():
        raise NotADirectoryError(f"output must be a file in an existing folder, got {output!r}")
    paths = find_images(images)
    trained = load_trained(Path(run))
    num_classes = len(trained.recorded.class_names)
    if not 1 <= top_k <= num_classes:
        raise ValueError(f"top_k must be from 1 to the {num_classes} classes of the run, got {top_k}")
    predictions = classify(trained, paths, top_k, batch_size, num_workers, device)
    if output is not None:
        Path(output).write_text(json.dumps(predictions, indent=2) + "\n")
    print(as_table(predictions))


def find_images(images: tuple[str, ...]) -> list[str]:
    """The files, and those in the folders.

    Raises:
        FileNotFoundError: If there is nothing of a name.
        ValueError: If a folder has no images, or none are given.
    """
    from ..datasets.image_folder import list_images

    if not images:
        raise ValueError("images must be files or folders, got none")
    found: list[str] = []
    for name in images:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"images must be files or folders, there is none at {name}")
        inside = list_images(path) if path.is_dir() else [name]
        if not inside:
            raise ValueError(f"images must be files or folders of images, there are none in {name}")
        found += inside
    return found


def classify(
    trained: Any, paths: list[str], top_k: int, batch_size: int, num_workers: int, device: str | None
) -> list[dict[str, Any]]:
    """For each image its most probable classes with their probabilities."""
    import torch

    from ..datasets import images_dataloader
    from ..models import ComposerClassifier
    from ..trainer import Trainer

    names = trained.recorded.class_names
    dataloader = images_dataloader(paths, trained.transform, batch_size=batch_size, num_workers=num_workers)
    trainer = Trainer(ComposerClassifier(trained.network, len(names)), device=device, progress_bar=False)
    outputs = torch.cat(trainer.predict(dataloader))
    trainer.close()
    probabilities, numbers = outputs.float().softmax(1).topk(top_k)
    return [
        {
            "image": path,
            "classes": [
                {"name": names[number], "probability": probability}
                for number, probability in zip(row_numbers, row, strict=True)
            ],
        }
        for path, row, row_numbers in zip(paths, probabilities.tolist(), numbers.tolist(), strict=True)
    ]


def as_table(predictions: list[dict[str, Any]]) -> str:
    """The predictions as lines of aligned text."""
    width = max(len(prediction["image"]) for prediction in predictions)
    lines = []
    for prediction in predictions:
        classes = "  ".join(f"{found['name']} {found['probability']:.1%}" for found in prediction["classes"])
        lines.append(f"{prediction['image']:<{width}}  {classes}")
    return "\n".join(lines)
