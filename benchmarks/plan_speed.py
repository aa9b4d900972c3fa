"""The speeds that `foregate plan` expects against live ones: a file of `foregate bench policies`.

    python benchmarks/plan_speed.py STORE POLICIES.json --json OUT

The link's bandwidth is the one that each live run had; the memory's is what `plan` assumes.
"""

import argparse
import json
from pathlib import Path

import foregate

POLICIES = ("lru", "lookahead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("live", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for row in json.loads(args.live.read_text())["rows"]:
        if row["name"] not in POLICIES:
            continue
        live = row["tokens_per_second"]["median"]
        link = row["bytes_per_token"] * live / row["link_share"]
        speed = foregate.plan(args.store, row["memory"], policy=row["name"], link_bandwidth=link).speed
        rows.append(
            {
                "store": args.store.name,
                "policy": row["name"],
                "memory": row["memory"],
                "link_bandwidth": link,
                "live": live,
                "low": speed.low,
                "expected": speed.expected,
                "high": speed.high,
            }
        )
        print(
            f"{row['name']}, {row['memory']}: live {live:.2f}, planned {speed.expected:.2f} "
            f"({speed.low:.2f} to {speed.high:.2f})",
            flush=True,
        )
    args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
