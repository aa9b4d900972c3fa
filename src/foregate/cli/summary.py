"""The small table after a run."""

from rich.console import Console
from rich.table import Table

MIB = 2**20


def print_summary(report: dict) -> None:
    """Print what the report says that a person wants to know first, on stderr."""
    experts, memory, tokens, seconds = report["experts"], report["memory"], report["tokens"], report["seconds"]
    speed = report["tokens_per_second"]
    share = memory["slots"] / report["model"]["experts"]
    model = report["model"]
    rows = {
        "weights": f"{model['bits']} bits in experts, {model['backbone_bits']} in attention and shared experts",
        "tokens/s": f"{speed:.1f}" if speed else "-",
        "new tokens": f"{tokens['generated']} after a prompt of {tokens['prompt']}",
        "first token": f"{seconds['first_token']:.2f} s, loading {seconds['load']:.2f} s",
        "experts in memory": f"{memory['slots']} of {report['model']['experts']} ({share:.0%}), {report['settings']['policy']}",
        "hits": f"{experts['hits']:,} ({experts['hit_rate']:.1%})" if experts["hit_rate"] is not None else "0",
        "misses": f"{experts['misses']:,}",
        "bytes read": f"{experts['bytes_read'] / MIB:,.1f} MiB, {experts['read_path']} reads",
        "waited for reads": f"{experts['stall_seconds']:.2f} s{_bound(report['busy'])}",
        "device": _device(report["device"], experts),
        "kernel": experts["kernel"],
        "peak memory": f"{memory['peak_resident_bytes'] / MIB:,.0f} MiB",
    }
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True, highlight=False).print(table)


def _device(device: dict, experts: dict) -> str:
    """Where experts are computed, and how they get there."""
    on_host = f", {experts['experts_on_host']:,} experts computed on the host" if device.get("placement") else ""
    return f"{device['name']}, records come {device['path']}{on_host}"


def _bound(busy: dict) -> str:
    """What was at work most of the time."""
    if busy["bound"] is None:
        return ""
    return f"; busy: processor {busy['processor']:.0%}, link {busy['link']:.0%}"
