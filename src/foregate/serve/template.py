"""From the messages of a chat to the tokens a model is given: its own chat template, or one for models without."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

# Each turn on a line, "role: content", and the assistant's to follow.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PLAIN_STOPS = ("\nuser:", "\nsystem:")  # where the model goes on with the next turn by itself


class TemplateRefusal(Exception):
    """A chat template does not take these messages; the text says why."""


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    template: str | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The tokens of a chat, up to where the assistant's next message begins.

    template: Jinja text instead of the model's own. Raises TemplateRefusal, and UnicodeEncodeError for text that is none.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise TemplateRefusal(str(error)) from None
    text.encode()
    # A model's template writes special tokens itself; the plain one knows none.
    return tokenizer(text, add_special_tokens=template == PLAIN_TEMPLATE, verbose=False)["input_ids"]
