"""Recording a trace: the model reads texts, and every router's input, scores and choice go to disk.

All work happens in `DIR.partial`: a recording that was killed goes on after the last sequence its journal names.
Sizes are known before the first byte is written; rows leave memory one layer of one sequence at a time.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foregate import __version__
from foregate.checkpoint.tensors import write_all
from foregate.checkpoint.workspace import PartialFolder, check_destination, io_error
from foregate.config import TraceConfig
from foregate.errors import ForegateError
from foregate.lookahead import trace
from foregate.lookahead.trace import TraceHeader, TraceLayer, TraceText
from foregate.model.evaluate import check_window, read_text
from foregate.model.experts import experts_call
from foregate.model.routers import Router, find_routers, router_input

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Sink = Callable[[int, dict[str, torch.Tensor]], None]  # (MoE layer, its columns of the sequence that runs)


@dataclass(frozen=True)
class Texts:
    """Texts as a tokenizer reads them."""

    prefix: torch.Tensor  # int64: special tokens at the start of every sequence
    facts: tuple[TraceText, ...]
    tokens: tuple[torch.Tensor, ...]  # int64, one a text


@dataclass(frozen=True)
class TracePlan:
    """What `record_trace` will do; nothing is written yet."""

    model: PreTrainedModel
    routers: tuple[Router, ...]
    header: TraceHeader
    prompts: tuple[torch.Tensor, ...]  # int64, one a sequence: what the model is given
    seed: int

    @property
    def nbytes(self) -> int:
        """Bytes the trace's data will take on disk, headers aside."""
        return self.header.nbytes + sum(tensor.nbytes for tensor in self.router_tensors().values())

    def router_tensors(self) -> dict[str, torch.Tensor]:
        """What the routers file holds: float32 by name, only what is known."""
        return {
            trace.router_tensor(name, index): value.contiguous()
            for index, router in enumerate(self.routers)
            for name, value in (("weight", router.weight), ("bias", router.bias), ("gain", router.gain))
            if value is not None
        }

    @property
    def fingerprint(self) -> str:
        """Changes whenever a resumed recording would not continue the same work."""
        manifest = self.model.foregate.store.manifest.to_json()
        facts = [__version__, self.seed, manifest, self.header.to_json()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_texts(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path]) -> Texts:
    """Read and tokenize text files. Raises ForegateError for one that is unreadable, not UTF-8 or empty."""
    if not files:
        raise ForegateError("no text to trace: name at least one file with --text")
    prefix = torch.tensor(tokenizer("")["input_ids"], dtype=torch.int64)
    facts, tokens = [], []
    for file in files:
        content = read_text(file)
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        encoded = content.encode()
        facts.append(TraceText(file.name, hashlib.sha256(encoded).hexdigest(), len(encoded), len(ids)))
        tokens.append(torch.tensor(ids, dtype=torch.int64))
    return Texts(prefix, tuple(facts), tuple(tokens))


def plan_trace(
    model: PreTrainedModel,
    texts: Texts,
    *,
    window: int = TraceConfig.window,
    max_tokens: int = TraceConfig.max_tokens,
    generate: int = TraceConfig.generate,
    seed: int = TraceConfig.seed,
) -> TracePlan:
    """Cut the texts into sequences and find the routers of a model that `foregate.load` gave.

    Windows of `window` tokens follow each other without overlap; a rest shorter than one is left out. The texts take
    turns, so that each has its share of `max_tokens` (0: no limit). With `generate`, a sequence is the first half of a
    window and that many tokens which the model continues it with. Raises ForegateError when a text is shorter than a
    window, the window does not suit the model, or a router is not found.
    """
    if generate < 0 or max_tokens < 0 or not 0 <= seed < 2**32:
        raise ForegateError("--generate, --max-tokens and --seed: 0 or above is needed, and a seed below 2**32")
    shortest = len(texts.prefix) + (2 if generate else 1)
    if window <= shortest:
        raise ForegateError(f"--window {window}: more than {shortest} tokens are needed")
    length = window // 2 + generate if generate else window
    check_window(model, max(window, length))
    if max_tokens and max_tokens < length:
        raise ForegateError(f"--max-tokens {max_tokens} does not hold one sequence of {length} tokens: raise it")
    windows = list(islice(_windows(texts, window - len(texts.prefix)), max_tokens // length if max_tokens else None))
    store = model.foregate.store
    routers = find_routers(model, store.layers)
    vocab_size, embedding_size = model.get_input_embeddings().weight.shape
    matrices = sum(rows * cols for rows, cols in (matrix.shape for matrix in store.matrices))
    header = TraceHeader(
        model_type=model.config.model_type,
        model_class=type(model).__name__,
        bits=store.manifest.bits,
        quantizer=store.manifest.quantizer,
        vocab_size=vocab_size,
        embedding_size=embedding_size,
        backbone_parameters=matrices + sum(param.numel() for param in model.parameters()),
        window=window,
        generated=generate,
        layers=tuple(
            TraceLayer(
                module=layer.module,
                router=router.name,
                num_experts=layer.num_experts,
                top_k=router.top_k,
                input_size=router.input_size,
                expert_input_size=router.expert_input_size,
                scores_size=router.scores_size,
                shares_input=router.shares_input,
            )
            for layer, router in zip(store.layers, routers, strict=True)
        ),
        texts=texts.facts,
        sequences=tuple(trace.Sequence(length * number, length, text) for number, (text, _) in enumerate(windows)),
    )
    prompts = tuple(torch.cat([texts.prefix, ids])[: length - generate] for _, ids in windows)
    return TracePlan(model, routers, header, prompts, seed)


def record_trace(plan: TracePlan, destination: str | Path, progress: Progress | None = None) -> Path:
    """Run the plan and write its trace to `destination`; returns its path. Run again after an interruption, it resumes.

    Raises ForegateError when the destination exists, the disk is too small, or a record cannot be read.
    """
    path = Path(destination)
    try:
        path = check_destination(destination)
        with _TraceFolder(path, plan.fingerprint, plan.nbytes) as folder:
            _Recording(plan, folder, progress or (lambda done, total: None)).run()
            save_file(plan.router_tensors(), folder.path / trace.ROUTERS_FILE)
            with folder.open(trace.ROUTERS_FILE):
                pass  # closing it brings it to disk
            folder.write(trace.HEADER_FILE, plan.header.to_json().encode())
            folder.publish()
    except OSError as error:
        raise io_error(error, path, "write the trace") from None
    return path


@contextlib.contextmanager
def observed(model: PreTrainedModel, modules: Sequence[str], routers: Sequence[Router], sink: Sink) -> Iterator[None]:
    """While this context lasts, every call of a layer's experts hands that layer's columns to `sink`.

    modules: paths of the experts modules. Columns are bfloat16 or int16 [tokens, width], as in a trace.
    """
    pending: dict[int, dict[str, torch.Tensor]] = {}

    def watch_router(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = router_input(args, kwargs)
            pending[index] = {
                "inputs": hidden.reshape(-1, hidden.shape[-1]).to(torch.bfloat16, copy=True),
                "scores": routers[index].scores(output).to(torch.bfloat16, copy=True),
            }

        return hook

    def watch_experts(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = experts_call(args, kwargs)
            columns = {**pending.pop(index), "chosen": call.chosen.to(torch.int16)}
            if not routers[index].shares_input:
                columns["experts"] = call.hidden.to(torch.bfloat16)
            sink(index, columns)

        return hook

    with contextlib.ExitStack() as handles:
        for index, router in enumerate(routers):
            handles.callback(router.module.register_forward_hook(watch_router(index), with_kwargs=True).remove)
            experts = model.get_submodule(modules[index])
            handles.callback(experts.register_forward_pre_hook(watch_experts(index), with_kwargs=True).remove)
        yield


class _TraceFolder(PartialFolder):
    """The folder of a recording: its journal holds the number of finished sequences."""

    job = "trace"
    result = "trace"

    @staticmethod
    def worth_resuming(journal: dict[str, Any]) -> bool:
        return bool(journal.get("sequences"))


class _Recording:
    """One recording: runs the sequences that the journal does not name."""

    def __init__(self, plan: TracePlan, folder: _TraceFolder, progress: Progress) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress
        self.header = plan.header
        self._files: dict[str, int] = {}  # name -> descriptor
        self._sequence = self.header.sequences[0]
        self._layers_written = 0

    def run(self) -> None:
        for name, nbytes in self.header.files().items():
            self.folder.allocate(name, nbytes)
        modules = [layer.module for layer in self.header.layers]
        done = self.folder.done.get("sequences", 0)
        with contextlib.ExitStack() as stack:
            self._files = {name: stack.enter_context(self.folder.open(name)) for name in self.header.files()}
            noted = time.monotonic()
            for number in range(done, len(self.header.sequences)):
                self._sequence, self._layers_written = self.header.sequences[number], 0
                self.progress(self._sequence.start, self.header.num_tokens)
                tokens = self._tokens(number)
                with observed(self.plan.model, modules, self.plan.routers, self._write), torch.inference_mode():
                    embedded = self.plan.model.get_input_embeddings()(tokens)
                    self.plan.model(tokens[None], use_cache=False, logits_to_keep=1)
                self._check_complete()
                self._write_rows(trace.EMBEDDINGS_FILE, embedded.to(torch.bfloat16))
                self._write_rows(trace.TOKENS_FILE, tokens.to(torch.int32)[:, None])
                if time.monotonic() - noted > TraceConfig.journal_seconds:
                    self.folder.sync(self._files.values())
                    self.folder.finished(sequences=number + 1)
                    noted = time.monotonic()
        self.folder.finished(sequences=len(self.header.sequences))
        self.progress(self.header.num_tokens, self.header.num_tokens)

    def _tokens(self, number: int) -> torch.Tensor:
        """The token ids of a sequence, int64 [length]: its prompt and what the model writes itself."""
        prompt, new = self.plan.prompts[number], self.header.generated
        if not new:
            return prompt
        model = self.plan.model
        torch.manual_seed(self.plan.seed + number)  # one a sequence: resumed, it writes the same
        with torch.inference_mode():
            return model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                max_new_tokens=new,
                min_new_tokens=new,  # sequences have one length: an end-of-text token is never sampled
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_beams=1,
                pad_token_id=0,  # nothing is padded
            )[0]

    def _write(self, index: int, columns: dict[str, torch.Tensor]) -> None:
        for name, (dtype, width) in self.header.layers[index].columns().items():
            if columns[name].shape != (self._sequence.length, width):
                shape = list(columns[name].shape)
                raise ForegateError(f"{self.header.layers[index].module}: {name} {shape} is not one row a token")
            self._write_rows(trace.column_file(name, dtype, index), columns[name])
        self._layers_written += 1

    def _write_rows(self, name: str, rows: torch.Tensor) -> None:
        content = rows.contiguous().view(torch.uint8).numpy()
        write_all(self._files[name], content, self._sequence.start * rows.shape[1] * rows.element_size())

    def _check_complete(self) -> None:
        if self._layers_written != len(self.header.layers):
            raise ForegateError(
                f"{self.header.model_class} ran {self._layers_written} of its {len(self.header.layers)} MoE layers: it "
                "cannot be traced"
            )


def _windows(texts: Texts, length: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(text, its next `length` tokens): the texts take turns until all are used up."""
    counts = [len(ids) // length for ids in texts.tokens]
    for fact, count in zip(texts.facts, counts, strict=True):
        if not count:
            raise ForegateError(
                f"{fact.name} is too short: it has {fact.tokens} tokens, a window of text {length}; use a smaller --window"
            )
    for number in range(max(counts)):
        for text, ids in enumerate(texts.tokens):
            if number < counts[text]:
                yield text, ids[number * length : (number + 1) * length]
