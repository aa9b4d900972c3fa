"""A chat turn by turn against the same turns computed from nothing by transformers' `generate`."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import foregate
from foregate import ForegateError
from foregate.model.generate import load_tokenizer
from foregate.serve.conversation import Conversation, Reply, Style
from foregate.serve.sampling import Sampling
from foregate.serve.template import PLAIN_TEMPLATE

MESSAGES = ["In the beginning", "And what then?", "Speak on"]
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@contextmanager
def loaded(store: Path) -> Iterator[Model]:
    model = foregate.load(store, memory="50%", threads=1)
    with closing(model.foregate):
        yield model, load_tokenizer(str(store))


@pytest.fixture(scope="module")
def demo(demo_store: Path) -> Iterator[Model]:
    with loaded(demo_store) as found:
        yield found


def style(**changes: object) -> Style:
    return Style(**{"max_new_tokens": 16, "context": 512, **changes})


def say(conversation: Conversation, message: str, **options: object) -> Reply:
    """What was emitted is what the reply says."""
    pieces: list[str] = []
    reply = conversation.say(message, pieces.append, **options)
    assert "".join(pieces) == reply.text
    return reply


def generated(model: Model, messages: list[dict[str, str]], template: str | None = None) -> str:
    """The reply to these messages, all computed now."""
    text = model[1].apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    ids = model[1](text, add_special_tokens=template == PLAIN_TEMPLATE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = model[0].generate(input_ids=ids, max_new_tokens=16, do_sample=False)
    return model[1].decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_every_turn_is_what_it_would_be_from_nothing(demo: Model) -> None:
    conversation = Conversation(*demo, style(system="Be brief."))
    reused = []
    for message in MESSAGES:
        history = [*conversation.messages, {"role": "user", "content": message}]
        reply = say(conversation, message)
        assert reply.text == generated(demo, history)
        assert (reply.stopped, reply.forgotten, reply.new_tokens) == (False, 0, 16)
        reused.append(reply.reused_tokens / reply.prompt_tokens)
    assert reused[0] == 0
    assert min(reused[1:]) > 0.25
    assert [m["role"] for m in conversation.messages] == ["system", *(["user", "assistant"] * 3)]


def test_after_a_reset_only_what_the_system_message_took_is_kept(demo: Model) -> None:
    conversation = Conversation(*demo, style(system="Be brief."))
    for message in MESSAGES[:2]:
        say(conversation, message)
    conversation.reset()
    assert [m["role"] for m in conversation.messages] == ["system"]
    reply = say(conversation, MESSAGES[2])
    fresh = say(Conversation(*demo, style(system="Be brief.")), MESSAGES[2])
    assert reply.text == fresh.text
    assert fresh.reused_tokens == 0 < reply.reused_tokens


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "granitemoehybrid"])
def test_caches_that_forget_are_not_cut(store: Callable[[str], Path], family: str) -> None:
    """A sliding window and recurrent states cannot go back: a history that changes is computed from its start."""
    with loaded(store(family)) as model:
        conversation = Conversation(*model, style(context=256))
        for message in MESSAGES:
            history = [*conversation.messages, {"role": "user", "content": message}]
            assert say(conversation, message).text == generated(model, history)


def test_a_full_context_forgets_the_oldest_turns(demo: Model) -> None:
    conversation = Conversation(*demo, style(system="Be brief.", context=96))
    forgotten = [say(conversation, f"{message} {'very ' * 8}").forgotten for message in MESSAGES]
    assert sum(forgotten) in (2, 4)
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert conversation.messages[1]["role"] == "user"
    assert conversation.messages[-2]["content"].startswith(MESSAGES[-1])
    before = list(conversation.messages)
    with pytest.raises(ForegateError, match="shorten it"):
        say(conversation, "word " * 90)
    assert conversation.messages == before


def test_a_reply_that_is_stopped(demo: Model) -> None:
    conversation, pieces = Conversation(*demo, style()), []
    reply = conversation.say(MESSAGES[0], pieces.append, lambda: len(pieces) >= 3)
    assert reply.stopped
    assert 3 <= reply.new_tokens < 16
    assert conversation.messages[-1] == {"role": "assistant", "content": reply.text.strip()}
    history = [*conversation.messages, {"role": "user", "content": MESSAGES[1]}]
    assert say(conversation, MESSAGES[1]).text == generated(demo, history)
    before = list(conversation.messages)
    assert say(conversation, MESSAGES[2], stop=lambda: True).text == ""
    assert conversation.messages == before


def test_what_goes_wrong_in_a_turn_is_forgotten(demo: Model) -> None:
    def fail(text: str) -> None:
        raise BrokenPipeError

    conversation = Conversation(*demo, style())
    say(conversation, MESSAGES[0])
    before = list(conversation.messages)
    with pytest.raises(BrokenPipeError):
        conversation.say(MESSAGES[1], fail)
    assert conversation.messages == before
    assert say(conversation, MESSAGES[1]).text == generated(demo, [*before, {"role": "user", "content": MESSAGES[1]}])


def test_seeds_make_a_chat_repeatable_and_its_turns_different(demo: Model) -> None:
    def chat(seed: int) -> list[str]:
        conversation = Conversation(*demo, style(sampling=Sampling(temperature=1.5, seed=seed)))
        texts = [say(conversation, MESSAGES[0]).text]
        conversation.messages.clear()
        return [*texts, say(conversation, MESSAGES[0]).text]

    first = chat(1)
    assert chat(1) == first
    assert chat(2) != first
    assert first[0] != first[1]


def test_a_model_without_a_template_needs_one_named(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo[1], "chat_template", None)
    with pytest.raises(ForegateError, match="--template plain"):
        Conversation(*demo, style())
    conversation = Conversation(*demo, style(template=PLAIN_TEMPLATE))
    history = [{"role": "user", "content": MESSAGES[0]}]
    assert say(conversation, MESSAGES[0]).text == generated(demo, history, PLAIN_TEMPLATE).split("\nuser:")[0]


def test_a_template_may_refuse(demo: Model) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    conversation = Conversation(*demo, style(system="Be brief.", template=template))
    with pytest.raises(ForegateError, match="no system role"):
        say(conversation, MESSAGES[0])
    with pytest.raises(ForegateError, match="not UTF-8"):
        say(Conversation(*demo, style()), "half a pair \ud800")


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next", "granitemoehybrid"])
def test_a_prompt_that_goes_on_where_the_last_one_ended(store: Callable[[str], Path], family: str) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with loaded(store(family)) as model:
        conversation = Conversation(*model, style(context=256, template=template))
        say(conversation, "In the", stop=iter([False, True]).__next__)
        conversation.messages.clear()
        message = "In the beginning was more than one word"
        reply = say(conversation, message)
        assert reply.text == generated(model, [{"role": "user", "content": message}], template)
        assert reply.reused_tokens == (len("In the") if family == "gpt_oss" else 0)
