"""A Hugging Face pipeline on a store: anything that takes a transformers model takes this one.

python examples/hf_pipeline.py [STORE]
"""

import sys

from transformers import AutoTokenizer, pipeline

import foregate

store = sys.argv[1] if len(sys.argv) > 1 else "build/demo.store"
model = foregate.load(store, memory="25%")
write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(store))

prompts = ["And the LORD said unto Moses,", "def read(self, path):\n    ", "Debian ist ein Betriebssystem"]
for prompt, (result,) in zip(prompts, write(prompts, max_new_tokens=24, do_sample=False), strict=True):
    print(f"{prompt!r} -> {result['generated_text'][len(prompt) :]!r}")
