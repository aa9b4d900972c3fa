"""What the shell may complete. Runs at every TAB: nothing heavy is imported."""

from collections.abc import Iterator
from pathlib import Path

# What imports PyTorch knows these too.
KERNEL_NAMES = ("auto", "cpu", "triton", "reference")
DEVICE_NAMES = ("cpu", "cuda", "auto", "simulated")
MODEL_FILES = ("foregate.json", "config.json")  # of stores, and of checkpoints


def policies(incomplete: str) -> list[str]:
    """Policies that begin so."""
    from foregate.schedule import POLICIES  # imports NumPy, which no other command line needs

    return [name for name in ("auto", *POLICIES) if name.startswith(incomplete)]


def kernels(incomplete: str) -> list[str]:
    """Kernels that begin so."""
    return [name for name in KERNEL_NAMES if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Devices that begin so."""
    return [name for name in DEVICE_NAMES if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Model folders that begin so, and other folders, with a slash, on the way to them."""
    return sorted(_folders(incomplete))


def _folders(incomplete: str) -> Iterator[str]:
    typed, slash, beginning = incomplete.rpartition("/")
    try:
        entries = list(Path(typed + slash or ".").expanduser().iterdir())
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(beginning) or entry.name.startswith(".") > beginning.startswith("."):
            continue
        if entry.is_dir():
            is_model = any((entry / name).is_file() for name in MODEL_FILES)
            yield f"{typed}{slash}{entry.name}{'' if is_model else '/'}"
