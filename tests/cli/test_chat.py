"""`foregate chat` as a person at a terminal meets it, and as a program at the other end of a pipe."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import foregate
from foregate.model.generate import load_tokenizer
from foregate.serve.conversation import Conversation, Style

OPTIONS = ("--temperature", 0, "--threads", 1, "--memory", "50%")


def test_at_a_terminal(terminal: Callable, demo_store: Path) -> None:
    person = terminal("chat", demo_store, *OPTIONS, "--max-new-tokens", 900)
    person.expect("ctrl-D ends\n>>> ")
    person.type("And then?\n")
    person.expect(r"And then\?\n(?s:.){40}")  # a reply that would go on for long
    person.type("\x03")
    person.expect(r"\(stopped\)\n>>> ")
    person.type("/stats\n")
    stats = person.expect(r"policy lookahead\n>>> ")
    assert "last reply" in stats
    assert "48 of 96 experts" in stats
    person.interrupt("ctrl-D or /exit ends\n>>> ")
    person.type("/help\n")
    person.expect("Ctrl-C stops a reply")
    person.type("/nonsense\n")
    person.expect("/nonsense is no command")
    person.type("/reset\n")
    person.expect("the conversation is forgotten\n>>> ")
    person.type("one \\\n")
    person.expect(r"\.\.\. $")
    person.type("two " * 1200 + "\\\n")
    person.type("three\n")
    person.expect("foregate: the message has .* shorten it.*\n>>> ")
    person.type("\x04")
    assert person.wait() == 0
    assert "\x1b[3" not in person.seen


def test_exit_ends(terminal: Callable, store: Callable[[str], Path]) -> None:
    person = terminal("chat", store("mixtral"), *OPTIONS)
    person.expect(">>> ")
    person.type("/exit\n")
    assert person.wait() == 0


def piped(lines: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foregate.cli.main", "chat", *map(str, arguments)]
    return subprocess.run(command, input=lines, capture_output=True, text=True)


def test_through_a_pipe(demo_store: Path) -> None:
    """Replies, and nothing else, on stdout: those of the same conversation held here."""
    options = (*OPTIONS, "--max-new-tokens", 12, "--system", "Be brief.")
    done = piped("In the\\\nbeginning\nAnd then?\n\n/reset\nSpeak", demo_store, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "the conversation is forgotten\n"
    model = foregate.load(demo_store, memory="50%", threads=1)
    with closing(model.foregate):
        style = Style(system="Be brief.", max_new_tokens=12, context=1024)
        conversation = Conversation(model, load_tokenizer(str(demo_store)), style)
        texts = [conversation.say(message, lambda text: None).text for message in ("In the\nbeginning", "And then?")]
        conversation.reset()
        texts.append(conversation.say("Speak", lambda text: None).text)
    assert done.stdout == "".join(f"{text}\n" for text in texts)


def test_an_error_ends_a_pipe(demo_store: Path) -> None:
    done = piped("word " * 2000 + "\nIn the beginning\n", demo_store, *OPTIONS)
    assert (done.returncode, done.stdout) == (2, "")
    assert "shorten it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_options_that_cannot_be(fails: Callable[..., str], demo_store: Path, tmp_path: Path) -> None:
    assert "--temperature -1" in fails("chat", demo_store, "--temperature", -1)
    assert "--context 1" in fails("chat", demo_store, "--context", 1)
    assert "name a file, or plain" in fails("chat", demo_store, "--template", tmp_path / "none.jinja")
    assert "no such store" in fails("chat", tmp_path / "nowhere")


@pytest.mark.parametrize("template", [None, "plain", "file"])
def test_templates(store: Callable[[str], Path], tmp_path: Path, template: str | None, capfd, monkeypatch) -> None:
    """A model without one: it is said how to go on, and both ways work."""
    import io

    from foregate.cli.main import main

    bare = tmp_path / "bare"
    bare.mkdir()
    for file in store("mixtral").iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    (tmp_path / "file.jinja").write_text("{{ messages[-1].content }}")
    named = tmp_path / "file.jinja" if template == "file" else template
    arguments = ["foregate", "chat", bare, *OPTIONS, "--max-new-tokens", 3, *(["--template", named] if named else [])]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    if template:
        assert (stopped.value.code, err) == (0, "")
        assert out
    else:
        assert (stopped.value.code, out) == (2, "")
        assert "has no chat template" in err
        assert "--template plain" in err
