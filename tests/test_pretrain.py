"""``tlcourse pretrain`` runs the whole path, and the arms run on what it makes."""

import hashlib
import json

import pytest
import torch

from tlcourse import arms, backbones, first, pretrain
from tlcourse.config import TrainConfig
from tlcourse.datasets import load_task
from tlcourse.scenes import SOURCES


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    assert pretrain.main(["glyphnet", "--steps", "50", "--out", str(folder)]) == 0
    return folder / "glyphnet.safetensors"


def test_short_run_writes_checkpoint_and_card(short_run):
    card = json.loads(short_run.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["num_steps"] == 50 and card["command"].endswith("--steps 50 --out FOLDER")
    assert card["sha256"] == hashlib.sha256(short_run.read_bytes()).hexdigest()
    state, (weight, bias) = backbones.read_checkpoint(short_run)
    body = backbones.GlyphNet()
    body.load_state_dict(state)
    logits = body(torch.zeros(1, 3, 32, 32)) @ weight.T + bias
    assert logits.shape == (1, SOURCES["glyphs"].num_classes)


def test_every_recipe_has_an_architecture_and_every_architecture_a_recipe():
    assert set(pretrain.RECIPES) == set(backbones.EMBEDDED)
    assert all(recipe.source in SOURCES for recipe in pretrain.RECIPES.values())


@pytest.mark.parametrize("argv", [["glyphnet", "--steps", "5"], ["glyphnet", "--steps", "0"]])
def test_short_run_replaces_nothing_shipped(argv, capsys):
    path = backbones.checkpoint_path("glyphnet")
    before = path.stat().st_mtime_ns
    assert pretrain.main(argv) == 2
    assert "needs --out" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before


def test_shipped_checkpoint_beats_random_features_by_far():
    task = load_task("wild_digits", 10, seed=0)
    random = arms.probe(task, backbones.load_backbone("glyphnet", False))
    trained = arms.probe(task, backbones.load_backbone("glyphnet"))
    assert trained.test_accuracy > random.test_accuracy + 0.2


def test_training_arm_learns_its_training_task():
    task = load_task("plain_digits", 10, seed=0)
    config = TrainConfig(lr=3e-3, num_steps=40, warmup_steps=5, progress=False)
    outcome = arms.train_all(task, backbones.load_backbone("glyphnet"), config, probe_first=True)
    assert outcome.test_accuracy > 0.6 and outcome.seconds > 0


def test_recorded_results_are_complete():
    found = arms.recorded("wild_digits")
    assert sorted(found) == [2, 5, 10, 20, 50]
    for comparison in found.values():
        assert {"pixels", "scratch", "probe, then fine-tune"} <= comparison.scores.keys()
        assert all(len(scores) >= 5 for scores in comparison.scores.values())
    with pytest.raises(FileNotFoundError, match="'nothing'"):
        arms.recorded("nothing")


def test_first_result_prints_a_table_and_draws(tmp_path, capsys):
    picture = tmp_path / "new" / "first.png"
    assert first.main(["--steps", "2", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "| network from scratch |" in out and str(picture) in out
