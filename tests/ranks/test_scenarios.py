"""Two processes train together; they are started once for all scenarios, since starting is what takes time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from etude.trainer import load_weights
from helpers.resumable import differences, make_trainer
from ranks import scenarios


def test_two_ranks(tmp_path: Path, subtests: pytest.Subtests) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, Path(scenarios.__file__), tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert (tmp_path / "results.json").exists(), done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(scenarios.SCENARIOS) > 15
    for scenario in scenarios.SCENARIOS:
        with subtests.test(scenario.__name__):
            errors = results.get(scenario.__name__, [f"did not run: {done.stderr[-3000:]}"])
            assert errors == [None, None], "\n".join(error for error in errors if error)
    with subtests.test("one process goes on from the shards of two"):
        checkpoint = tmp_path / "sharded" / "ep0-ba4.pt"
        trainer = make_trainer(load_path=checkpoint)
        assert differences(load_weights(checkpoint), trainer.state.model.state_dict()) == []
        assert len(trainer.state.optimizers[0].state_dict()["state"]) > 10
        trainer.fit()
        assert trainer.state.timestamp.batch == 10
    with subtests.test("a changed shard is found"):
        shard = next((tmp_path / "sharded").glob("ep0-ba4.*.shards")) / "__1_0.distcp"
        contents = bytearray(shard.read_bytes())
        contents[len(contents) // 2] ^= 1
        shard.write_bytes(contents)
        with pytest.raises(ValueError, match="its shards are not good"):
            make_trainer(load_path=checkpoint)
