"""A plan as tables: where the bytes go, what fits at each width, what it may give."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from foregate.cli.units import format_bandwidth
from foregate.planner import Plan
from foregate.planner.speed import Speed
from foregate.sizes import format_bytes

MEANING = {
    "runtime": "Python, PyTorch, transformers, tokenizer",
    "backbone": "embeddings, attention, routers, norms, shared experts, head",
    "gates": "lookahead gates",
    "kv_cache": "keys, values and states of {cached}",
    "transients": "what a pass of {prompt:,} tokens holds for a moment",
    "buffers": "through which records pass",
}


def print_plan(plan: Plan) -> None:
    """On stdout; as wide as the widest table needs where it is piped."""
    console = Console(highlight=False)
    console.width = max(console.width, 110) if not console.is_terminal else console.width
    console.print(
        f"[bold]{plan.model}[/bold]: {plan.class_name}, {plan.layers} MoE layers, {plan.experts:,} experts, "
        f"top-{plan.top_k}; {plan.bits} bits, backbone {plan.backbone_bits}, on {plan.device}"
    )
    console.print(_division(plan))
    if plan.budget.host is not None:
        console.print(_host(plan))
    console.print(_widths(plan))
    for line in _notes(plan):
        console.print(line)


def _division(plan: Plan) -> Table:
    budget, session = plan.budget, plan.session
    table = _table("" if budget.host is None else f"{plan.device} memory", "memory", "", "")
    cached = f"{session.context:,} tokens" + (f", {session.sequences} times" if session.sequences > 1 else "")
    for name, nbytes in budget.needs.parts.items():
        if nbytes:
            meaning = MEANING[name].format(cached=cached, prompt=session.prompt)
            if name == "runtime" and budget.host is not None:
                meaning = "the driver's context"
            table.add_row(name.replace("_", " ").replace("kv", "KV"), format_bytes(nbytes), meaning)
    share = budget.slots / plan.experts
    table.add_row(
        "slots",
        format_bytes(budget.slots_bytes),
        f"{budget.slots:,} of {plan.experts:,} experts ({share:.1%}) of {format_bytes(budget.slot_bytes)}, "
        f"{plan.slots_by_layer:.1f} a layer on average",
    )
    held = budget.needs.total + budget.slots_bytes
    table.add_section()
    table.add_row("in all", format_bytes(held), "" if budget.needs.exact else "KV cache and transients are estimated")
    if budget.needs.peak_loading > held:
        table.add_row("while loading", format_bytes(budget.needs.peak_loading), "the most that is held at any time")
    return table


def _host(plan: Plan) -> Table:
    host = plan.budget.host
    table = _table("host memory", "memory", "", "")
    for name, nbytes in host.needs.parts.items():
        if nbytes:
            table.add_row(name.replace("_", " "), format_bytes(nbytes), MEANING[name])
    rest = f", {plan.records_on_disk:,} on the disk" if plan.records_on_disk else ""
    found = f"{host.records:,} experts wait here{rest}"
    table.add_row("records", format_bytes(host.records * host.record_bytes), found)
    table.add_section()
    table.add_row("in all", format_bytes(host.total_bytes), "")
    return table


def _widths(plan: Plan) -> Table:
    table = _table("", "experts", "one", "fit", "share", "tokens/s", first="bits")
    for width in plan.widths:
        sizes = (format_bytes(width.experts_bytes), format_bytes(width.record_bytes))
        if width.slots is None:
            smallest = f"needs {format_bytes(width.smallest_bytes)}"
            table.add_row(str(width.bits), *sizes, "none", smallest, "-")
        else:
            share = f"{width.slots / plan.experts:.1%}"
            table.add_row(str(width.bits), *sizes, f"{width.slots:,}", share, _speed(width.speed))
    return table


def _notes(plan: Plan) -> list[str]:
    figures, speed = plan.figures, plan.speed
    limit = f", the model's limit is {plan.context_limit:,}" if plan.context_limit else ""
    behind = f"; those that only the disk has at {format_bandwidth(figures.disk_bandwidth)}"
    notes = [
        f"largest context: {plan.largest_context:,} tokens, with only one layer's experts beside it{limit}",
        f"expected: {_speed(speed)} tokens/s with {plan.policy}, by simulation: weights read at "
        f"{format_bandwidth(figures.memory_bandwidth)}, misses at {format_bandwidth(figures.link_bandwidth)} ({figures.source})"
        + (behind if plan.records_on_disk else ""),
        f"the routing is {speed.routing}'s, for want of this model's; the range covers the other demo model's too",
    ]
    if plan.budget.host is not None:
        notes.append("what a layer takes beside its bytes is assumed: no card has been measured (docs/plan.md)")
    return notes


def _speed(speed: Speed | None) -> str:
    return "-" if speed is None else f"{speed.expected:.1f} ({speed.low:.1f} to {speed.high:.1f})"


def _table(title: str, *columns: str, first: str = "") -> Table:
    table = Table(title=title or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
    return table
