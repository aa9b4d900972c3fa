"""Opening a Hugging Face checkpoint: a local folder or a hub id, safetensors only, no code of its own is ever run."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from foregate.checkpoint.tensors import TensorEntry, read_header
from foregate.errors import ForegateError, first_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
STORE_MANIFEST = "foregate.json"
# What travels into the store besides weights: configuration, tokenizer, chat template. Never code, never pickles.
GATES_FILE = "lookahead.safetensors"  # gates fit the model, whatever the store's bits
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", GATES_FILE)
NOT_SIDE_FILES = ("*.index.json", STORE_MANIFEST)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configuration and the place of every tensor."""

    path: Path
    config: PretrainedConfig
    tensors: dict[str, TensorEntry]

    def side_files(self) -> list[Path]:
        """Configuration, tokenizer, chat template and lookahead gates."""
        found = {p for pattern in SIDE_FILES for p in self.path.glob(pattern) if p.is_file()}
        return sorted(p for p in found if not any(p.match(pattern) for pattern in NOT_SIDE_FILES))

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the tensors."""
        return sorted({entry.path for entry in self.tensors.values()})


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open the checkpoint in folder `source`, or download it if `source` is a hub id.

    Raises ForegateError when there is no such folder, its weights are not safetensors or are cut short, or its
    configuration is not one that transformers knows.
    """
    path = _locate(str(source))
    if (path / STORE_MANIFEST).exists():
        raise ForegateError(f"{path} is a Foregate store already: use it as it is, or name the original checkpoint")
    if not (path / "config.json").is_file():
        raise ForegateError(f"{path} has no config.json: name the folder of a Hugging Face checkpoint")
    return Checkpoint(path, load_config(path), _index(path))


def load_config(path: Path) -> PretrainedConfig:
    """The transformers configuration in folder `path`. Raises ForegateError when transformers cannot read it."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        try:
            name = json.loads((path / "config.json").read_text()).get("model_type", "missing")
        except (ValueError, OSError, AttributeError):
            raise ForegateError(f"{path / 'config.json'} is not a JSON object: copy or download it again") from None
        raise ForegateError(
            f"{path / 'config.json'} (model_type {name}) is not a model this transformers knows, and code inside a "
            f"checkpoint is never run: {first_line(error)}"
        ) from None


def find_checkpoint(source: str) -> Path | None:
    """The checkpoint folder `source`, or what was downloaded of the hub id `source`; None if nothing was.

    Raises ForegateError for what is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ForegateError(f"{source} is neither a store (no {STORE_MANIFEST}) nor a checkpoint (no config.json)")
        return path.resolve()
    _check_hub_id(source, "store or checkpoint")
    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(source, local_files_only=True))
    return None


def download_settings(hub_id: str) -> Path:
    """Configuration and tokenizer of a model on the hub, without its weights; returns their folder.

    Raises ForegateError when they cannot be downloaded.
    """
    _check_hub_id(hub_id)
    return _download(hub_id, SIDE_FILES)


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    _check_hub_id(source)
    return _download(source, ("*.safetensors", *SIDE_FILES))


def _check_hub_id(source: str, wanted: str = "folder") -> None:
    if Path(source).expanduser().exists():
        raise ForegateError(f"{source} is a file: name the folder of a checkpoint")
    if not HUB_ID.fullmatch(source) or source.startswith("."):
        raise ForegateError(f"no such {wanted}: {source}")


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises many kinds; each becomes the same one line
        raise ForegateError(
            f"no such folder: {hub_id}; nor could it be downloaded as a hub id ({type(error).__name__}): check the "
            "name and the network, or give a local folder"
        ) from None


def _index(path: Path) -> dict[str, TensorEntry]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError, OSError):
            raise ForegateError(f"{index} is not a weight index: copy or download it again") from None
    elif (path / "model.safetensors").is_file():
        weight_map, names = None, ["model.safetensors"]
    else:
        raise ForegateError(_no_weights(path))
    tensors = {}
    for name in names:
        if Path(name).name != name:
            raise ForegateError(f"{index} names a file outside its folder ({name}): this checkpoint is not trusted")
        tensors.update(read_header(path / name))
    absent = sorted(set(weight_map or ()) - set(tensors))
    if absent:
        raise ForegateError(
            f"{index} names {len(absent)} tensors that no file holds, first {absent[0]}: download again"
        )
    return tensors


def _no_weights(path: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        return (
            f"{path} holds pickled weights ({pickles[0]}), which can run code when read: convert them to safetensors "
            "first, or use the model's safetensors version"
        )
    return f"{path} has no model.safetensors: name the folder of a checkpoint with safetensors weights"
