"""Quick start: a checkpoint becomes a store, and the store writes text with a quarter of its experts in memory.

python examples/quick_start.py [STORE]

STORE, by default build/demo.store, is made from the demo model if it is not there.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

import foregate

store = Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo.store")
if not store.exists():
    foregate.convert(Path(__file__).parents[1] / "demo/mixtral-tiny", store, bits=4)

model = foregate.load(store, memory="25%")  # an ordinary transformers model; bytes work too: memory="8GiB"
tokenizer = AutoTokenizer.from_pretrained(store)
prompt = tokenizer("And the LORD said unto Moses,", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))

totals = model.foregate.recorder.totals()
print(f"\n{totals.hits} hits, {totals.misses} misses, {totals.bytes_read / 2**20:.0f} MiB read", file=sys.stderr)
