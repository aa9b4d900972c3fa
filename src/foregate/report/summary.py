"""One report in a few lines of text."""

from foregate.report.foresight import LAYER, Score, by_horizon
from foregate.report.read import RunReport

MIB = 2**20


def summarise(report: RunReport) -> str:
    """What happened, for a person; a line for each thing."""
    totals, ahead, speed = report.totals, report.prefetched, report.tokens_per_second
    lines = {
        "run": f"{report.store}, {report.policy}, {report.slots} of {report.experts} experts in memory",
        "tokens": f"{report.new_tokens} after a prompt of {report.prompt_tokens}"
        + (f", {speed:.1f} tokens/s" if speed else ""),
        "experts": f"{totals.hits:,} hits ({report.hit_rate:.1%}), {totals.misses:,} misses",
        "stall": f"{totals.stall_seconds:.2f} s, {report.stall_share:.1%} of {report.seconds:.2f} s",
        "read": f"{totals.bytes_read / MIB:,.1f} MiB, {report.bytes_per_token / MIB:.2f} MiB a token",
    }
    if ahead.started:
        lines["prefetches"] = (
            f"{ahead.started:,}: {ahead.in_time:,} in time, {ahead.late:,} late, {ahead.wasted:,} wasted"
        )
        parts = {"useful": ahead.useful_bytes, "late": ahead.late_bytes, "wasted": ahead.wasted_bytes}
        if ahead.unused_bytes:
            parts["not used yet"] = ahead.unused_bytes
        lines["prefetched"] = ", ".join(f"{nbytes / MIB:,.1f} MiB {what}" for what, nbytes in parts.items())
    for (source, horizon), score in by_horizon(report.scores).items():
        where = "layer" if source == LAYER else "from the token"
        lines[f"{where} +{horizon}"] = _foresight(score)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _foresight(score: Score) -> str:
    return f"recall@k {_share(score.recall)}, precision {_share(score.precision)}, {score.calls:,} calls"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
