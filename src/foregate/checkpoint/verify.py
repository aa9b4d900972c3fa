"""Verification: every byte of a store against the checksums its manifest recorded at conversion."""

import hashlib
from pathlib import Path

from foregate.checkpoint.convert import Progress
from foregate.checkpoint.store import Store
from foregate.checkpoint.tensors import COPY_BYTES
from foregate.errors import ForegateError

NAMED_AT_MOST = 5


def verify(path: str | Path, progress: Progress | None = None) -> int:
    """Check every record and the backbone; returns the number of records. Raises ForegateError naming what is damaged."""
    store = Store(path)
    progress = progress or (lambda done, total: None)
    total = store.experts_bytes + store.manifest.backbone_bytes + store.matrices_bytes
    damaged, done = [], 0
    with store.experts_path.open("rb") as stream:
        for index, layer in enumerate(store.layers):
            for expert in range(layer.num_experts):
                offset, nbytes = store.location((index, expert))
                if _checksum(stream, offset, nbytes) != store.manifest.checksums[index][expert]:
                    damaged.append(f"record {store.record_name((index, expert))}")
                done += nbytes
                progress(done, total)
    with store.backbone_path.open("rb") as stream:
        if _checksum(stream, 0, store.manifest.backbone_bytes) != store.manifest.backbone_checksum:
            damaged.append(store.backbone_path.name)
    damaged += _damaged_matrices(store)
    progress(total, total)
    if damaged:
        more = f" and {len(damaged) - NAMED_AT_MOST} more" if len(damaged) > NAMED_AT_MOST else ""
        raise ForegateError(f"{path} is damaged: {', '.join(damaged[:NAMED_AT_MOST])}{more}; convert the model again")
    return store.num_experts


def _damaged_matrices(store: Store) -> list[str]:
    if not store.matrices:
        return []
    with store.matrices_path.open("rb") as stream:
        return [
            f"matrix {matrix.module}"
            for index, matrix in enumerate(store.matrices)
            if _checksum(stream, *store.matrix_location(index)) != store.manifest.matrix_checksums[index]
        ]


def _checksum(stream, offset: int, nbytes: int) -> str:
    stream.seek(offset)
    digest = hashlib.sha256()
    while nbytes:
        piece = stream.read(min(nbytes, COPY_BYTES))
        if not piece:
            break  # a file that shrinks under us fails the comparison
        digest.update(piece)
        nbytes -= len(piece)
    return digest.hexdigest()
