"""`foregate chat`: talk with a model at the terminal, or through a pipe with one message a line."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from foregate.cli import options
from foregate.config import ChatConfig, EngineConfig, GenerateConfig

NAME = "chat"
EXAMPLE = "foregate chat model.store --memory 25% --system 'Answer in one sentence.'"
PLAIN = "plain"


def run(
    model: options.Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before the chat.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="plain|FILE",
            help="Instead of the model's chat template: turns as lines 'role: content', or a file with a Jinja template.",
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = ChatConfig.max_new_tokens,
    context: options.Context = ChatConfig.context,
    memory: options.Memory = EngineConfig.memory,
    policy: options.Policy = EngineConfig.policy,
    threads: options.Threads = EngineConfig.threads,
    kernel: options.Kernel = EngineConfig.kernel,
    exact: options.Exact = EngineConfig.exact,
    device: options.Device = EngineConfig.device,
    host_memory: options.HostMemory = EngineConfig.host_memory,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help=f"{options.TEMPERATURE_HELP} By default the model's own.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help=f"{options.TOP_P_HELP} By default the model's own.")
    ] = None,
    seed: options.Seed = GenerateConfig.seed,
    bits: options.Bits = None,
    yes: options.Yes = False,
) -> None:
    """Chat with a model. /help lists what can be typed beside messages; ctrl-C stops a reply, ctrl-D ends.

    Replies go to stdout, everything else to stderr. With a pipe as input, each line is a message.
    """
    from foregate import load
    from foregate.cli.models import open_model
    from foregate.cli.talk import Talk
    from foregate.model.generate import check_settings, load_tokenizer
    from foregate.serve.conversation import Conversation, Style
    from foregate.serve.sampling import Sampling

    check_settings(max_new_tokens, 0.0 if temperature is None else temperature, 1.0 if top_p is None else top_p, seed)
    jinja = _read_template(template)
    store = open_model(model, bits, yes)
    tokenizer = load_tokenizer(str(store))
    loaded = load(
        store,
        memory=memory,
        policy=policy,
        threads=threads,
        kernel=kernel,
        exact=exact,
        device=device,
        host_memory=host_memory,
        context=max(context, 1),
        eager=True,  # captured steps need a KV cache that stays where it is; this one grows and is cut
    )
    style = Style(
        system=system,
        template=jinja,
        max_new_tokens=max_new_tokens,
        context=_context(context, loaded),
        sampling=Sampling.of_request(loaded.generation_config, temperature, top_p, seed),
    )
    Talk(Conversation(loaded, tokenizer, style), loaded.foregate, sys.stdin.isatty() and sys.stdout.isatty()).run()


def _read_template(template: str | None) -> str | None:
    from foregate import ForegateError
    from foregate.serve.template import PLAIN_TEMPLATE

    if template in (None, PLAIN):
        return PLAIN_TEMPLATE if template else None
    try:
        return Path(template).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ForegateError(f"--template {template}: {reason}; name a file, or plain") from None


def _context(wanted: int, model) -> int:
    from foregate import ForegateError

    if wanted < 2:
        raise ForegateError(f"--context {wanted}: too small, a prompt and a reply need 2 tokens at least")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, limit) if limit else wanted
