"""CheckpointSaver: intervals, number of checkpoints kept, the best one."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from etude import Trainer
from etude.engine import Callback, Event, LoggerDestination, Time
from etude.trainer import CheckpointSaver
from etude.trainer.checkpoint.atomic import _machine
from etude.trainer.checkpoint.file import read_checkpoint
from etude.trainer.checkpoint.folder import newest_good
from helpers.linear_training import make_linear_trainer as make_trainer
from helpers.networks import LinearModel, vectors
from helpers.recording import At

BATCHES_PER_EPOCH = 6


def names(folder: Path) -> list[str]:
    """In the order in which they were saved."""
    order = lambda name: [int(number) for number in name[2:-3].split("-ba")][::-1]  # noqa: E731
    return sorted((path.name for path in folder.glob("ep*-ba*.pt")), key=order)


def pointer(folder: Path, name: str) -> str:
    return (folder / name).read_text().strip()


class TestWhen:
    @pytest.mark.parametrize(
        ("interval", "expected"),
        [
            ("1ep", ["ep0-ba0", "ep1-ba6", "ep2-ba12"]),
            (Time(1, "ep"), ["ep0-ba0", "ep1-ba6", "ep2-ba12"]),
            ("2ep", ["ep0-ba0", "ep2-ba12"]),
            ("3ep", ["ep0-ba0", "ep2-ba12"]),
            ("5ba", ["ep0-ba0", "ep0-ba5", "ep1-ba10", "ep2-ba12"]),
            ("16sp", ["ep0-ba0", "ep0-ba4", "ep1-ba8", "ep1-ba12", "ep2-ba12"]),
            ("6sp", ["ep0-ba0", *(f"ep{(b - 1) // 6}-ba{b}" for b in (2, 3, 5, 6, 8, 9, 11, 12)), "ep2-ba12"]),
            ("0.25dur", ["ep0-ba0", "ep0-ba3", "ep0-ba6", "ep1-ba9", "ep1-ba12", "ep2-ba12"]),
            ("1dur", ["ep0-ba0", "ep1-ba12", "ep2-ba12"]),
        ],
    )
    def test_in_any_unit_at_the_start_and_at_the_end(
        self, tmp_path: Path, interval: str | Time, expected: list[str]
    ) -> None:
        make_trainer(callbacks=CheckpointSaver(tmp_path, interval, num_to_keep=-1)).fit()
        assert names(tmp_path) == [f"{name}.pt" for name in expected]
        assert pointer(tmp_path, "latest") == "ep2-ba12.pt"

    def test_an_interval_of_a_tenth_of_the_training_is_due_ten_times(self, tmp_path: Path) -> None:
        """Although 0.3 / 0.1 is a little under 3."""
        make_trainer(max_duration="10ba", callbacks=CheckpointSaver(tmp_path, "0.1dur", num_to_keep=-1)).fit()
        assert [name.split("-")[1] for name in names(tmp_path)] == [f"ba{number}.pt" for number in range(11)]

    @pytest.mark.parametrize(("interval", "seconds"), [("30sec", 10), ("0.5min", 10), ("30sec", 12.5)])
    def test_by_the_clock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: str, seconds: float) -> None:
        now = [1000.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])

        class Tick(Callback):
            def batch_end(self, state: Any, logger: Any) -> None:
                now[0] += seconds

        make_trainer(max_duration="9ba", callbacks=[Tick(), CheckpointSaver(tmp_path, interval, num_to_keep=-1)]).fit()
        due = [b for b in range(1, 10) if b * seconds // 30 > (b - 1) * seconds // 30]
        assert len(due) >= 3
        assert [int(name[:-3].split("-ba")[1]) for name in names(tmp_path)] == sorted({0, *due, 9})

    def test_the_first_checkpoint_is_saved_before_the_first_step(self, tmp_path: Path) -> None:
        note = At(Event.BATCH_START, lambda state: names(tmp_path))
        make_trainer(callbacks=note, save_folder=tmp_path).fit()
        assert note.answers[0] == ["ep0-ba0.pt"]

    def test_a_folder_that_cannot_be_written_fails_before_any_step(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        note = At(Event.BATCH_START, lambda state: None)
        model = LinearModel()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(OSError, match="file"):
            make_trainer(model, callbacks=note, save_folder=tmp_path / "file" / "folder").fit()
        assert note.answers == []
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_no_moment_is_saved_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = []
        replace = os.replace
        monkeypatch.setattr("os.replace", lambda old, new: (written.append(Path(new).name), replace(old, new))[1])
        make_trainer(
            eval_dataloader=vectors(),
            callbacks=CheckpointSaver(tmp_path, "3ba", num_to_keep=-1, best="min:loss/eval/total"),
        ).fit()
        written = [name for name in written if name.endswith(".pt")]
        assert "ep2-ba12.pt" in written
        assert len(written) == len(set(written))

    def test_a_second_fit_continues_to_save(self, tmp_path: Path) -> None:
        trainer = make_trainer(max_duration="3ba", save_folder=tmp_path, save_interval="2ba")
        trainer.fit()
        trainer.state.max_duration = Time(6, "ba")
        trainer.fit()
        assert names(tmp_path) == ["ep0-ba4.pt", "ep0-ba6.pt", "ep1-ba6.pt"]

    def test_the_interval_continues_after_a_resume(self, tmp_path: Path) -> None:
        settings = {"save_interval": "4ba", "save_num_checkpoints_to_keep": -1}
        make_trainer(save_folder=tmp_path / "whole", **settings).fit()
        (tmp_path / "resumed").mkdir()
        (tmp_path / "resumed" / "ep0-ba4.pt").write_bytes((tmp_path / "whole" / "ep0-ba4.pt").read_bytes())
        make_trainer(save_folder=tmp_path / "resumed", autoresume=True, **settings).fit()
        assert names(tmp_path / "resumed") == names(tmp_path / "whole")[1:]

    def test_nothing_is_saved_without_being_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        make_trainer().fit()
        assert list(tmp_path.iterdir()) == []


class TestWhichStay:
    @pytest.mark.parametrize("keep", [1, 2, 5])
    def test_the_newest(self, tmp_path: Path, keep: int) -> None:
        make_trainer(max_duration="5ba", callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=keep)).fit()
        assert names(tmp_path) == [f"ep0-ba{number}.pt" for number in range(6)][-keep:]

    def test_three_are_kept_by_default_and_all_with_minus_one(self, tmp_path: Path) -> None:
        make_trainer(max_duration="5ba", save_folder=tmp_path / "3", save_interval="1ba").fit()
        assert len(names(tmp_path / "3")) == 3
        make_trainer(
            max_duration="5ba", save_folder=tmp_path / "all", save_interval="1ba", save_num_checkpoints_to_keep=-1
        ).fit()
        assert len(names(tmp_path / "all")) == 6

    def test_there_is_always_a_whole_one_while_another_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        save = torch.save

        def look_and_save(contents: Any, file: Any) -> None:
            seen.append(names(tmp_path))
            save(contents, file)

        monkeypatch.setattr("torch.save", look_and_save)
        make_trainer(max_duration="4ba", callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=1)).fit()
        assert seen == [[], *([f"ep0-ba{number}.pt"] for number in range(4))]

    def test_damaged_ones_that_a_resume_fell_back_from_do_not_count(self, tmp_path: Path) -> None:
        keep_all = {"save_interval": "1ba", "save_num_checkpoints_to_keep": -1}
        make_trainer(save_folder=tmp_path, max_duration="5ba", **keep_all).fit()
        for name in ("ep0-ba4.pt", "ep0-ba5.pt"):
            (tmp_path / name).write_bytes(b"damaged")
        keep_two = {"save_interval": "10ba", "save_num_checkpoints_to_keep": 2, "autoresume": True}
        make_trainer(save_folder=tmp_path, max_duration="6ba", **keep_two).fit()
        good = [path.name for path in tmp_path.glob("*.pt") if path.read_bytes() != b"damaged"]
        assert sorted(good) == ["ep0-ba3.pt", "ep1-ba6.pt"]

    def test_files_that_are_no_checkpoints_stay(self, tmp_path: Path) -> None:
        others = ["mine.pt", "ep1.pt", "notes.txt", ".hidden.pt"]
        for name in others:
            (tmp_path / name).touch()
        make_trainer(callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=1)).fit()
        assert all((tmp_path / name).exists() for name in others)


class Script(LinearModel):
    """Has one metric, with values that are given beforehand."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {} if is_train else {"script": Metric(self.values)}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Any) -> None: ...


class Metric:
    def __init__(self, values: list[float]) -> None:
        self.values = values

    def to(self, device: Any) -> "Metric":
        return self

    def compute(self) -> float:
        return self.values.pop(0)


NAN, INF = float("nan"), float("inf")


class TestTheBest:
    def scripted(
        self, folder: Path, values: list[float], best: str = "max:metrics/eval/script", **more: Any
    ) -> Trainer:
        settings = {"max_duration": f"{len(values)}ba", "eval_interval": "1ba", "eval_dataloader": vectors(), **more}
        saver = CheckpointSaver(folder, "1ep", num_to_keep=1, best=best)
        return make_trainer(Script(*values), callbacks=saver, **settings)

    @pytest.mark.parametrize(
        ("mode", "values", "expected"),
        [
            ("max", [1, 3, 2], 2),
            ("max", [3, 2, 1], 1),
            ("max", [1, 2, 3], 3),
            ("max", [2, 2, 2], 1),  # the first of equal ones
            ("max", [-3, -1, -2], 2),
            ("min", [1, 3, 2], 1),
            ("min", [3, 1, 2], 2),
            ("min", [-1, -3, -2], 2),
            ("max", [NAN, 1, 2, NAN, 1], 3),
            ("min", [NAN, 2, 1, NAN, 2], 3),
            ("max", [-INF, 0, -1], 2),
        ],
    )
    def test_it_is_kept_beyond_the_newest(self, tmp_path: Path, mode: str, values: list[float], expected: int) -> None:
        self.scripted(tmp_path, values, f"{mode}:metrics/eval/script").fit()
        assert pointer(tmp_path, "best") == f"ep0-ba{expected}.pt"
        assert names(tmp_path) == [f"ep0-ba{number}.pt" for number in sorted({expected, len(values)})]
        contents = read_checkpoint(tmp_path / f"ep0-ba{expected}.pt")
        assert contents["progress"]["eval_metrics"]["metrics/eval/script"] == values[expected - 1]

    def test_a_resume_remembers_it(self, tmp_path: Path) -> None:
        self.scripted(tmp_path, [1, 5, 2, 3], eval_interval="1ba").fit()
        self.scripted(tmp_path, [4, 3, 2], max_duration="7ba", autoresume=True).fit()
        assert pointer(tmp_path, "best") == "ep0-ba2.pt"
        assert names(tmp_path) == ["ep0-ba2.pt", "ep1-ba7.pt"]

    def test_a_resume_finds_a_better_one(self, tmp_path: Path) -> None:
        self.scripted(tmp_path, [1, 5, 2]).fit()
        self.scripted(tmp_path, [4, 6], max_duration="5ba", autoresume=True).fit()
        assert pointer(tmp_path, "best") == "ep0-ba5.pt"
        assert names(tmp_path) == ["ep0-ba5.pt"]

    def test_a_resume_with_another_metric_forgets_the_best_value(self, tmp_path: Path) -> None:
        self.scripted(tmp_path, [1, 5, 2]).fit()
        self.scripted(tmp_path, [9, 7], "min:metrics/eval/script", max_duration="5ba", autoresume=True).fit()
        assert pointer(tmp_path, "best") == "ep0-ba5.pt"

    def test_an_unknown_metric_is_an_error_that_lists_the_known(self, tmp_path: Path) -> None:
        known = "loss/eval/total, metrics/eval/script"
        with pytest.raises(ValueError, match=f"best must name one of the evaluation's metrics, {known}, got 'acc'"):
            self.scripted(tmp_path, [1], "max:acc").fit()

    def test_without_evaluation_it_is_refused_when_the_trainer_is_built(self, tmp_path: Path) -> None:
        saver = CheckpointSaver(tmp_path, best="max:x")
        with pytest.raises(ValueError, match='best must come with an eval_dataloader to have an effect, got "max:x"'):
            make_trainer(callbacks=saver)

    def test_there_is_no_pointer_to_the_best_without_best(self, tmp_path: Path) -> None:
        make_trainer(eval_dataloader=vectors(), save_folder=tmp_path).fit()
        assert not (tmp_path / "best").exists()

    def test_a_checkpoint_that_was_not_saved_is_not_the_best(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The third evaluation is the best, but the disk is full then; the fourth beats what is there."""
        trainer = self.scripted(tmp_path, [1, 2, 9, 5, 3])
        fsync, saver = os.fsync, trainer.state.callbacks[-1]
        assert isinstance(saver, CheckpointSaver)
        saver.on_full_disk = "continue"

        def full(file: Any) -> None:
            if trainer.state.timestamp.batch == 3:
                raise OSError(errno.ENOSPC, "No space left")
            fsync(file)

        monkeypatch.setattr("os.fsync", full)
        trainer.fit()
        assert pointer(tmp_path, "best") == "ep0-ba4.pt"
        assert names(tmp_path) == ["ep0-ba4.pt", "ep0-ba5.pt"]


class TestWhatKilledProcessesLeft:
    def test_it_is_removed_at_the_start(self, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        stale = [
            tmp_path / f".{name}.{_machine()}.{ended.pid}.0123abcd.tmp" for name in ("ep1-ba5.pt", "latest", "best")
        ]
        for path in stale:
            path.touch()
        make_trainer(save_folder=tmp_path).fit()
        assert [path for path in stale if path.exists()] == []


class TestBadArguments:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"interval": "0ba"}, 'interval must be positive, got "0ba"'),
            ({"interval": "-1ep"}, "interval must be positive"),
            ({"interval": "0sec"}, "interval must be positive"),
            ({"interval": "1.5dur"}, 'interval must be at most "1dur"'),
            ({"interval": "often"}, "interval: a time string must be like"),
            ({"num_to_keep": 0}, "num_to_keep must be an int >= 1, or -1 for all, got 0"),
            ({"num_to_keep": -2}, "num_to_keep must be"),
            ({"num_to_keep": True}, "num_to_keep must be"),
            ({"num_to_keep": 2.0}, "num_to_keep must be"),
            ({"best": "accuracy"}, 'best must be "max:" or "min:" and the name of a metric, got \'accuracy\''),
            ({"best": "max:"}, "best must be"),
            ({"best": "top:accuracy"}, "best must be"),
            ({"best": 3}, "best must be"),
            ({"on_full_disk": "pray"}, "on_full_disk must be one of 'stop', 'continue', got 'pray'"),
        ],
    )
    def test_they_are_refused_at_once(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as caught:
            CheckpointSaver(tmp_path, **settings)
        assert message in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"save_interval": "1ep"}, 'save_interval must come with a save_folder to have an effect, got "1ep"'),
            (
                {"save_num_checkpoints_to_keep": 2},
                "save_num_checkpoints_to_keep must come with a save_folder to have an effect, got 2",
            ),
            ({"autoresume": True}, "autoresume must come with a save_folder to have an effect"),
            ({"load_weights_only": True}, "load_weights_only must come with a load_path to have an effect"),
        ],
    )
    def test_settings_without_effect_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            make_trainer(**settings)
        assert message in str(caught.value)

    def test_one_saver_is_enough(self, tmp_path: Path) -> None:
        saver = CheckpointSaver(tmp_path)
        for settings in ({"save_folder": tmp_path, "callbacks": saver}, {"callbacks": [saver, CheckpointSaver("x")]}):
            with pytest.raises(ValueError, match="must give at most one CheckpointSaver, got several"):
                make_trainer(**settings)


class Keeps(LoggerDestination):
    """Keeps something that is not plain."""

    def state_dict(self) -> dict[str, Any]:
        return {"things": [1, {"path": Path("x")}]}


class TestWhatIsNotPlain:
    @pytest.mark.parametrize("argument", ["callbacks", "loggers"])
    def test_it_is_an_error_at_the_first_save_that_names_the_place(self, tmp_path: Path, argument: str) -> None:
        note = At(Event.BATCH_START, lambda state: None)
        settings: dict[str, Any] = {"callbacks": [note], "loggers": []}
        settings[argument] = [*settings[argument], Keeps()]
        place = {"callbacks": r"callbacks\.1", "loggers": r"loggers\.0"}[argument]
        with pytest.raises(TypeError, match=rf"^{place}\.state\.things\.1\.path must be plain .*PosixPath") as caught:
            make_trainer(save_folder=tmp_path, **settings).fit()
        assert note.answers == []
        assert "while saving" in "".join(caught.value.__notes__)
        assert newest_good(tmp_path) is None
        assert list(tmp_path.iterdir()) == []
