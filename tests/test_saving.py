"""Files that are whole or not there, and models that come back from them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tlcourse.backbones import Classifier, load_backbone
from tlcourse.saving import load_model, save_model, save_state, write_whole


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(load_backbone("glyphnet", pretrained=False), num_classes=4)


def test_save_and_load_gives_identical_logits(model, tmp_path):
    images = torch.randn(3, 3, 32, 32)
    save_model(model, tmp_path / "model.safetensors")
    other = Classifier(load_backbone("glyphnet", False, seed=8), num_classes=4)
    assert not torch.equal(other(images), model(images))
    assert torch.equal(load_model(tmp_path / "model.safetensors", other)(images), model(images))


def test_unsaved_trainable_parameter_is_an_error(model, tmp_path):
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def state_dict(self, *args, **kwargs):
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "head" not in k}

    with pytest.raises(ValueError, match=r"'inner.head.weight' would not be saved"):
        save_model(Forgetful(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_load_refuses_another_architecture_and_changes_nothing(model, tmp_path):
    path = tmp_path / "model.safetensors"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "head.bias"}, path)
    with pytest.raises(ValueError, match=r"the file lacks 'head.bias'"):
        load_model(path, model)
    save_file(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="the model lacks 'extra'"):
        load_model(path, model)
    save_file(state | {"head.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"'head.bias' has shape \(7,\), the model expects \(4,\)"):
        load_model(path, model)
    with pytest.raises(FileNotFoundError, match="no saved model"):
        load_model(tmp_path / "none", model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def half(partial: Path) -> None:
        partial.write_text("ne")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_tensors_that_share_memory_or_have_gaps_are_written_out(tmp_path):
    x = torch.arange(6.0)
    state = {"whole": x, "same": x, "every other": x[::2], "turned": x.view(2, 3).T}
    read = load_file(save_state(state, tmp_path / "new" / "x.safetensors"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
