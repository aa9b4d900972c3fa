"""Tokenizer, splits and token files of the demo corpus, all kept in a cache folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from . import sources

VOCAB_SIZE = 3072
BOS, EOS, PAD, USER, ASSISTANT = SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>")
TOKENIZER_BYTES_PER_KIND = 560_000
EXCERPT_BYTES = 32_768
MAX_POSITIONS = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Corpus:
    """The prepared corpus: training tokens, validation and held-out text by kind."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        if not (cache / "sizes.json").is_file():
            prepare(cache)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(cache / "tokenizer")
        self.sizes: dict[str, dict[str, int]] = json.loads((cache / "sizes.json").read_text())

    def train_tokens(self, kind: str) -> np.ndarray:
        """The kind's training documents as one stream, each between bos and eos."""
        return np.load(self.cache / "train" / f"{kind}.npy", mmap_mode="r")

    def text(self, split: str, kind: str) -> str:
        """The text of the "valid" or "heldout" split."""
        return (self.cache / split / f"{kind}.txt").read_bytes().decode()


def prepare(cache: Path) -> None:
    """Fetch the sources, split them, train the tokenizer and encode the training text."""
    documents = sources.load_documents(sources.fetch_packages(cache))
    train = {kind: [d.text for d in docs if d.split == "train"] for kind, docs in documents.items()}
    tokenizer = train_tokenizer(train)
    tokenizer.save_pretrained(cache / "tokenizer")
    sizes: dict[str, dict[str, int]] = {}
    for kind, docs in documents.items():
        sizes[kind] = {"train_bytes": sum(len(text.encode()) for text in train[kind])}
        for split in ("valid", "heldout"):
            text = "\n\n".join(d.text.strip("\n") for d in docs if d.split == split).encode()
            sizes[kind][f"{split}_bytes"] = len(text)
            (cache / split).mkdir(exist_ok=True)
            (cache / split / f"{kind}.txt").write_bytes(text)
        tokens = encode_documents(tokenizer, train[kind])
        sizes[kind]["train_tokens"] = len(tokens)
        (cache / "train").mkdir(exist_ok=True)
        np.save(cache / "train" / f"{kind}.npy", tokens)
    # Written last: its presence says that the cache is complete.
    (cache / "sizes.json").write_text(json.dumps(sizes, indent=1))


def train_tokenizer(train: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from equally much text of each kind."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for texts in train.values() for text in spread(texts)), trainer)
    # A prompt starts with bos, as every training window does.
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def spread(texts: list[str]) -> list[str]:
    """Documents evenly spread over ``texts``, TOKENIZER_BYTES_PER_KIND in all."""
    share = min(1.0, TOKENIZER_BYTES_PER_KIND / sum(len(text) for text in texts))
    return [text for number, text in enumerate(texts) if int((number + 1) * share) > int(number * share)]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents as one array of token ids, each between bos and eos."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16) for ids in encoded])


def write_excerpts(corpus: Corpus, folder: Path) -> None:
    """Write the beginning of each kind's held-out text, at most EXCERPT_BYTES, to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in sources.KINDS:
        text = corpus.text("heldout", kind).encode()[:EXCERPT_BYTES].decode(errors="ignore")
        (folder / f"{kind}.txt").write_bytes(text[: text.rindex("\n\n") + 1].encode())
