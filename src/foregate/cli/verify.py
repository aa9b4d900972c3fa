"""`foregate verify`: every byte of a store against its checksums."""

import json

from foregate.cli import options

NAME = "verify"
EXAMPLE = "foregate verify model.store"


def run(store: options.Store, as_json: options.Json = False) -> None:
    """Check every record of a store against its checksum. Exit code 2 if one is damaged."""
    from foregate import verify
    from foregate.cli.progress import byte_progress

    with byte_progress("verifying") as progress:
        count = verify(store, progress)
    if as_json:
        print(json.dumps({"store": str(store), "records": count, "intact": True}))
    else:
        print(f"{store}: {count} records and the backbone are intact")
