"""`course ship`: the checkpoints that stand in data/checkpoints are whole, small, and those of a finished run."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from course import artifacts, ship
from minimind.model import MiniMind, ModelConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """A run with the three stages, the model a small one."""
    folder = tmp_path / "run"
    for stage in ship.STAGES:
        (folder / "artifacts" / stage).mkdir(parents=True)
        (folder / "artifacts" / stage / "tokenizer.json").write_text("{}")
        if stage != "tokenizer":
            MiniMind(ModelConfig.preset("tiny", vocab_size=300)).save_pretrained(folder / "artifacts" / stage)
    (folder / "metrics.json").write_text(json.dumps({"pretrain/facts": 0.5, "other": 1}))
    return folder


def test_ships_half_precision_that_loads(run, tmp_path):
    manifest = ship.ship(run, tmp_path / "checkpoints")
    shipped, original = tmp_path / "checkpoints/sft", run / "artifacts/sft"
    assert ship.size_of(shipped) < 0.6 * ship.size_of(original) and manifest["metrics"] == {"pretrain/facts": 0.5}
    for a, b in zip(MiniMind.from_pretrained(shipped).parameters(), MiniMind.from_pretrained(original).parameters()):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=1e-3)


def test_a_missing_stage_leaves_the_old_checkpoints(run, tmp_path):
    target = tmp_path / "checkpoints"
    ship.ship(run, target)
    before = (target / "manifest.json").read_bytes()
    (run / "artifacts/sft").rename(run / "artifacts/elsewhere")
    with pytest.raises(FileNotFoundError, match="sft"):
        ship.ship(run, target)
    assert (target / "manifest.json").read_bytes() == before


def test_a_checkpoint_over_the_limit_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "FILE_LIMIT", 1000)
    with pytest.raises(ValueError, match="pretrain|sft"):
        ship.ship(run, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_the_shipped_checkpoints_are_whole_and_small():
    folder = ROOT / "data/checkpoints"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(ship.STAGES)
    for name, wanted in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted, f"{name} is not the file that was shipped"
    assert all(artifacts.about(folder / stage) for stage in ship.STAGES), "a stage without its marker"
    assert all(ship.size_of(folder / stage) <= ship.FILE_LIMIT for stage in ship.STAGES) and ship.size_of(folder) <= ship.ALL_LIMIT


def test_the_shipped_chat_model_answers():
    """The checkpoint that chapter 0 opens with knows people whom its chat data never asked about."""
    from minimind.sft import ask
    from minimind.tokenizer import Tokenizer
    from minimind.world import make_world

    folder = ROOT / "data/checkpoints/sft"
    model, tokenizer = MiniMind.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    world = json.loads((folder / "finished.json").read_text())["world"]
    rows = [row for row in make_world(world["people"], world["seed"]).questions() if not row["seen"]][::10]
    right = sum(row["answer"] in ask(model, tokenizer, row["question"]) for row in rows)
    assert right >= 0.7 * len(rows), f"{right} of {len(rows)}"
