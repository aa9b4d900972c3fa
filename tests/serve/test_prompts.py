"""From messages to tokens: the model's template, tools, and the plain one for models without."""

import copy
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foregate.serve.errors import ApiError
from foregate.serve.prompts import Encoder
from foregate.serve.schemas import ChatRequest

DEMO = Path(__file__).parents[2] / "demo/mixtral-tiny"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
WITH_TOOLS = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}={{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.arguments.city }}){% endfor %};{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


def text(tokenizer: PreTrainedTokenizerBase, template: str | None, **body: object) -> str:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer.decode(Encoder(tokenizer, 3072, 200).chat(ChatRequest(**body)))


def test_the_models_template_is_used_once(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "x"},
    ]
    written = text(tokenizer, tokenizer.chat_template, messages=messages)
    assert written == "<|bos|><|user|>hi<|assistant|>yes<|eos|><|user|>x<|assistant|>"


def test_without_a_template_turns_are_lines(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    assert text(tokenizer, None, messages=messages) == "<|bos|>system: be brief\nuser: ab\nassistant:"


def test_tools_and_calls_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "sun?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes", "tool_call_id": "1"},
    ]
    asked = {"messages": messages, "tools": [TOOL]}
    assert text(tokenizer, WITH_TOOLS, **asked) == "[weather]user=sun?;assistant=(Ulm);tool=yes;"
    assert text(tokenizer, WITH_TOOLS, **asked, tool_choice="none").startswith("user=")


def test_what_the_template_refuses_is_the_clients_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ApiError, match="refuses these messages: users only") as caught:
        text(tokenizer, "{{ raise_exception('users only') }}", messages=[{"role": "user", "content": "x"}])
    assert caught.value.status == 400
