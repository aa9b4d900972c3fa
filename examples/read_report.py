"""What a run's report says: how fast, what bounds it, and hits and waiting by layer.

foregate generate build/demo.store --prompt "And the LORD said unto Moses," --report run.json
python examples/read_report.py run.json
"""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
model, memory, busy = report["model"], report["memory"], report["busy"]
print(f"{model['class']}, {model['bits']} bits, {memory['slots']} of {model['experts']} experts in memory")
if report["tokens_per_second"] is not None:
    print(
        f"{report['tokens_per_second']:.1f} tokens/s; processor busy {busy['processor']:.0%}, link {busy['link']:.0%}"
    )

print("layer  hit rate  MiB read  seconds waited")
for number, layer in enumerate(report["by_layer"]):
    routed = layer["hits"] + layer["misses"]
    hit_rate = f"{layer['hits'] / routed:.1%}" if routed else "-"
    print(f"{number:5}  {hit_rate:>8}  {layer['bytes_read'] / 2**20:8.1f}  {layer['stall_seconds']:14.3f}")

fetched = report["prefetches"]
used = fetched["in_time"] + fetched["late"]
print(
    f"prefetches: {fetched['started']} started, {used} used ({fetched['late']} of them late), {fetched['wasted']} wasted"
)
