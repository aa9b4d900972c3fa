"""What is planned for: a store, a checkpoint's folder, or a hub id of which only the configuration is fetched."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from foregate.checkpoint.architecture import Architecture, inspect_architecture
from foregate.checkpoint.outline import outline
from foregate.checkpoint.source import HUB_ID, STORE_MANIFEST, load_config
from foregate.checkpoint.store import Contents, Store
from foregate.errors import ForegateError
from foregate.model.generate import load_tokenizer
from foregate.model.loading import AUTO, LOOKAHEAD, LRU, gates_bytes


@dataclass(frozen=True)
class PlannedModel:
    """A model as far as its configuration tells, or its store."""

    name: str
    folder: Path
    architecture: Architecture
    store: Store | None  # None: it is still to be converted

    def contents(self, bits: int, backbone_bits: int) -> Contents:
        """Records and matrices: the store's, or those of a conversion to these bits."""
        return self.store or outline(self.architecture, bits, backbone_bits)

    def policy(self, policy: str) -> str:
        """What `auto` is for this model."""
        if policy != AUTO:
            return policy
        return LOOKAHEAD if gates_bytes(self.folder, LOOKAHEAD) else LRU


def open_model(model: str | Path) -> PlannedModel:
    """Read a configuration, and what `generate` holds in memory before it loads. No weights are read or fetched.

    Raises ForegateError when there is no such model, or it has no experts that can be streamed.
    """
    folder = _locate(str(model))
    store = Store(folder) if (folder / STORE_MANIFEST).exists() else None
    config = load_config(folder)
    with contextlib.suppress(ForegateError):  # it counts in the runtime; a bare configuration has none
        load_tokenizer(str(folder))
    return PlannedModel(str(model), folder, inspect_architecture(config), store)


def _locate(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ForegateError(f"{path} has no config.json: name a store, a checkpoint's folder or a hub id")
        return path.resolve()
    if path.is_file() or not HUB_ID.fullmatch(model) or model.startswith("."):
        raise ForegateError(f"no such folder: {model}")
    return _fetch(model)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, "config.json")).parent
    except Exception as error:  # the hub client raises many kinds; each becomes the same one line
        raise ForegateError(
            f"no such folder: {hub_id}; nor could its config.json be fetched as a hub id's ({type(error).__name__}): check "
            "the name and the network, or give a local folder"
        ) from None
