"""Images in folders."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from etude.datasets import ImageDataloaders, image_folder_dataloaders
from etude.datasets.image_files import ImageFiles
from helpers.image_writing import truncate, write_folder, write_image

COUNTS = {"ant": 10, "bee": 5, "cat": 2}


def load(folder: Path, **settings: Any) -> ImageDataloaders:
    return image_folder_dataloaders(folder, **{"batch_size": 4, "image_size": 8, **settings})


def samples(data: ImageDataloaders, part: str) -> list[tuple[str, int]]:
    dataset = getattr(data, f"{part}_dataloader").dataset
    assert isinstance(dataset, ImageFiles)
    return list(dataset.samples)


def files(data: ImageDataloaders, part: str) -> set[str]:
    return {"/".join(path.split("/")[-2:]) for path, _ in samples(data, part)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", COUNTS)


class TestSplit:
    def test_every_class_is_split_and_no_image_is_lost(self, folder: Path) -> None:
        data = load(folder)
        train, evaluation = (Counter(number for _, number in samples(data, part)) for part in ("train", "eval"))
        assert evaluation == {0: 2, 1: 1, 2: 1}
        assert train == {0: 8, 1: 4, 2: 1}
        assert not files(data, "train") & files(data, "eval")
        assert data.class_names == ("ant", "bee", "cat")
        assert data.num_classes == 3

    def test_the_seed_determines_the_draws(self, folder: Path) -> None:
        held_out = [files(load(folder, seed=seed), "eval") for seed in (0, 0, 1, 2)]
        assert held_out[0] == held_out[1]
        assert len(set(map(frozenset, held_out))) > 1

    def test_another_class_does_not_change_the_split_of_the_others(self, folder: Path) -> None:
        before = files(load(folder), "eval")
        write_folder(folder, {"aardvark": 3})
        assert before < files(load(folder), "eval")

    @pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.5, 5), (0.99, 9)])
    def test_the_share_is_chosen(self, folder: Path, fraction: float, count: int) -> None:
        assert Counter(number for _, number in samples(load(folder, eval_fraction=fraction), "eval"))[0] == count

    def test_images_have_the_number_of_their_class(self, folder: Path) -> None:
        data = load(folder, augmentation="none", normalization=((0, 0, 0), (1, 1, 1)))
        for images, targets in (*data.train_dataloader, *data.eval_dataloader):
            assert images.shape[1:] == (3, 8, 8)
            assert torch.equal((images[:, 0].mean((1, 2)) * 255 / 40).floor(), targets.float())


class TestTrainAndVal:
    def test_the_owners_split_is_taken(self, tmp_path: Path) -> None:
        for name in ("train", "val", "test"):
            write_folder(tmp_path / name, {"ant": 3, "bee": 1})
        data = load(tmp_path)
        assert {Path(path).parts[-3] for path, _ in samples(data, "train")} == {"train"}
        assert {Path(path).parts[-3] for path, _ in samples(data, "eval")} == {"val"}
        assert data.class_names == ("ant", "bee")

    def test_a_class_that_val_lacks_does_not_renumber_the_others(self, tmp_path: Path) -> None:
        """As it would if val were read by itself."""
        write_folder(tmp_path / "train", {"ant": 2, "bee": 2, "cat": 2})
        write_folder(tmp_path / "val", {"cat": 2})
        assert {number for _, number in samples(load(tmp_path), "eval")} == {2}

    def test_classes_that_train_lacks_are_refused(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "train", {"ant": 2, "bee": 2})
        write_folder(tmp_path / "val", {"ant": 2, "bees": 2})
        with pytest.raises(ValueError, match=r"val must have classes of .*train only, it has bees besides"):
            load(tmp_path)

    def test_a_fraction_would_have_no_effect(self, tmp_path: Path) -> None:
        for name in ("train", "valid"):
            write_folder(tmp_path / name, {"ant": 3, "bee": 1})
        with pytest.raises(ValueError, match=r"eval_fraction must not be given .* train and valid, got 0\.5"):
            load(tmp_path, eval_fraction=0.5)

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"bus": 2, "train": 2, "val": 2})
        assert load(tmp_path).class_names == ("bus", "train", "val")


class TestWhatCounts:
    def test_subfolders_and_every_case_of_a_suffix_do(self, folder: Path) -> None:
        write_image(folder / "cat" / "deep" / "deeper" / "a.JPG")
        assert len(samples(load(folder), "train")) + len(samples(load(folder), "eval")) == sum(COUNTS.values()) + 1

    def test_hidden_folders_and_other_files_do_not(self, folder: Path) -> None:
        for name in (".ipynb_checkpoints", ".git"):
            write_image(folder / name / "a.png")
        (folder / "cat" / "notes.txt").write_text("notes")
        write_image(folder / "cat" / ".hidden.png")
        write_image(folder / "stray.png")
        data = load(folder)
        assert data.class_names == ("ant", "bee", "cat")
        assert len(samples(data, "train")) + len(samples(data, "eval")) == sum(COUNTS.values())

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
    def test_images_of_every_mode_become_rgb(self, folder: Path, mode: str) -> None:
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (9, 30)).save(folder / "cat" / f"a.{suffix}")
        for images, _ in load(folder).train_dataloader:
            assert images.shape[1:] == (3, 8, 8)


class TestCorruptImages:
    @pytest.fixture
    def damaged(self, folder: Path) -> Path:
        truncate(folder / "ant" / "003.png")
        (folder / "bee" / "001.png").write_bytes(b"not an image")
        (folder / "bee" / "002.png").write_bytes(b"")
        return folder

    def test_they_are_named(self, damaged: Path) -> None:
        found = []
        data = load(damaged, batch_size=1)
        for loader in (data.train_dataloader, data.eval_dataloader):
            for number in range(len(loader.dataset)):  # type: ignore[arg-type]  # it has a length
                try:
                    loader.dataset[number]
                except OSError as error:
                    found.append(str(error))
        assert len(found) == 3
        for name in ("ant/003.png", "bee/001.png", "bee/002.png"):
            assert any(f"{name} cannot be read as an image" in text for text in found)
        assert all("on_corrupt='skip'" in text for text in found)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_they_are_skipped_and_counted(self, damaged: Path, num_workers: int) -> None:
        data = load(damaged, on_corrupt="skip", num_workers=num_workers)
        assert data.num_skipped == 3
        left = files(data, "train") | files(data, "eval")
        assert len(left) == sum(COUNTS.values()) - 3
        assert not left & {"ant/003.png", "bee/001.png", "bee/002.png"}

    def test_finite_steps_are_not_skipped(self, folder: Path) -> None:
        assert load(folder, on_corrupt="skip").num_skipped == 0

    def test_a_class_without_any_image_left_is_refused(self, folder: Path) -> None:
        for path in (folder / "cat").iterdir():
            truncate(path)
        with pytest.raises(ValueError, match="every class must have an image that can be read, there is none in cat"):
            load(folder, on_corrupt="skip")


class TestRefusals:
    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ({}, "must hold one folder of images for each class, it has no folders"),
            ({"ant": 0, "bee": 0}, "it has no images in ant, bee"),
            ({"ant": 2, "bee": 0}, "must have images of every class, there are none in bee"),
            ({"ant": 2, "bee": 1}, "every class must have at least 2 images, .* only one of bee"),
            ({"ant": 4}, "must have folders of at least 2 classes, it has only ant"),
            ({f"class {n}": 1 for n in range(9)}, "class 0, .*class 4 and 4 more"),
        ],
    )
    def test_folders_that_are_not_image_folders_are_refused(
        self, tmp_path: Path, counts: dict[str, int], message: str
    ) -> None:
        folder = write_folder(tmp_path / "images", counts)
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            load(folder)

    def test_missing_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for name in ("missing", "file"):
            with pytest.raises(FileNotFoundError, match=f"folder must be a folder of images, .*{name}"):
                load(tmp_path / name)

    def test_an_empty_class_of_val(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "train", {"ant": 2, "bee": 2})
        write_folder(tmp_path / "val", {"ant": 2, "bee": 0})
        with pytest.raises(ValueError, match="val must have images of every class, there are none in bee"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
            ({"image_size": 7}, "image_size must be an int >= 8, got 7"),
            ({"num_workers": -1}, "num_workers must be an int >= 0, got -1"),
            ({"num_workers": True}, "num_workers must be an int >= 0, got True"),
            ({"resize_size": 7}, "resize_size must be an int >= 8, got 7"),
            ({"augmentation": "mixup"}, "augmentation must be one of none, crop_flip, reference, got 'mixup'"),
            ({"normalization": "cifar"}, r"normalization must be 'imagenet', 'data' or \(mean, std\) .* got 'cifar'"),
            ({"normalization": ((0, 0, 0), (1, 1, 0))}, "normalization must be .* with std above 0"),
            ({"normalization": ((0, 0), (1, 1))}, "normalization must be .* of three channels"),
            ({"eval_fraction": 0.0}, r"eval_fraction must be a number in \(0, 1\), got 0.0"),
            ({"eval_fraction": 1}, r"eval_fraction must be a number in \(0, 1\), got 1"),
            ({"seed": -1}, r"seed must be an int in \[0, 2\*\*32\), got -1"),
            ({"seed": 2**32}, r"seed must be an int in \[0, 2\*\*32\), got 4294967296"),
            ({"on_corrupt": "ignore"}, "on_corrupt must be 'raise' or 'skip', got 'ignore'"),
            ({"persistent_workers": True}, "persistent_workers=True must come with num_workers >= 1, got 0"),
        ],
    )
    def test_invalid_arguments_are_refused(self, folder: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            load(folder, **settings)


class TestLoading:
    def test_settings_reach_the_dataloaders(self, folder: Path) -> None:
        data = load(folder, num_workers=2, pin_memory=True, batch_size=3)
        for loader in (data.train_dataloader, data.eval_dataloader):
            assert (loader.num_workers, loader.pin_memory, loader.batch_size) == (2, True, 3)
            assert loader.persistent_workers
        assert not load(folder).train_dataloader.persistent_workers
        assert not load(folder, num_workers=2, persistent_workers=False).eval_dataloader.persistent_workers

    def test_an_incomplete_training_batch_is_dropped_unless_it_is_the_only_one(self, folder: Path) -> None:
        """A batch of one image would break BatchNorm; 13 images are for training."""
        assert [len(targets) for _, targets in load(folder, batch_size=4).train_dataloader] == [4, 4, 4]
        assert [len(targets) for _, targets in load(folder, batch_size=50).train_dataloader] == [13]
        assert sum(len(targets) for _, targets in load(folder, batch_size=3).eval_dataloader) == 4

    def test_only_training_images_are_shuffled(self, folder: Path) -> None:
        data = load(folder, batch_size=13)
        orders = [torch.cat([targets for _, targets in data.train_dataloader]).tolist() for _ in range(3)]
        assert len(set(map(tuple, orders))) > 1
        assert torch.cat([targets for _, targets in data.eval_dataloader]).tolist() == [0, 0, 1, 2]

    def test_workers_of_every_kind_can_take_the_dataset(self, folder: Path) -> None:
        dataset = load(folder).train_dataloader.dataset
        assert pickle.loads(pickle.dumps(dataset)).samples == dataset.samples  # type: ignore[attr-defined]

    def test_statistics_of_the_data_normalise_it(self, folder: Path) -> None:
        data = load(folder, augmentation="none", normalization="data", resize_size=8)
        whole = torch.cat([data.train_dataloader.dataset[n][0].flatten(1) for n in range(13)], dim=1)
        assert torch.allclose(whole.mean(1), torch.zeros(3), atol=1e-5)
        assert torch.allclose(whole.std(1, correction=0), torch.ones(3), atol=1e-5)

    def test_images_without_contrast_cannot_be_normalised_by_themselves(self, tmp_path: Path) -> None:
        for name in ("ant/a", "ant/b", "bee/a", "bee/b"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match="normalization='data' must have images with some contrast"):
            load(tmp_path, normalization="data")
