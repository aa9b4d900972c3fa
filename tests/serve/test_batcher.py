"""The batcher by itself: places, company, and errors that stay where they belong."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import foregate
from foregate.model.generate import generate, load_tokenizer
from foregate.serve.batcher import Batcher, Overloaded
from foregate.serve.sampling import Sampling
from foregate.serve.sequence import Order, Piece

PROMPT = tuple(range(40, 70))  # a token a byte


@pytest.fixture
def batcher(store: Callable[[str], Path]) -> Iterator[Batcher]:
    model = foregate.load(store("mixtral"), memory="50%")
    batcher = Batcher(model, load_tokenizer(str(store("mixtral"))), max_running=2, max_waiting=2)
    yield batcher
    batcher.close()
    model.foregate.close()


def results(batcher: Batcher, orders: list[Order]) -> list[list[Piece]]:
    """The pieces of each order, all submitted at once."""
    pieces: list[list[Piece]] = [[] for _ in orders]
    ended = [threading.Event() for _ in orders]

    def emitter(index: int) -> Callable[[Piece], None]:
        def emit(piece: Piece) -> None:
            pieces[index].append(piece)
            if piece.last:
                ended[index].set()

        return emit

    batcher.reserve(len(orders))
    for index, order in enumerate(orders):
        batcher.submit(order, emitter(index))
    assert all(event.wait(30) for event in ended)
    return pieces


def test_more_orders_than_run_at_once_each_get_their_own(batcher: Batcher, store: Callable[[str], Path]) -> None:
    model, tokenizer = foregate.load(store("mixtral")), load_tokenizer(str(store("mixtral")))
    prompts = ("In", "In the", "In the beginning", "was the word")
    orders = [Order(tuple(tokenizer(prompt)["input_ids"]), max_tokens=6 + len(prompt)) for prompt in prompts]
    for prompt, order, pieces in zip(prompts, orders, results(batcher, orders), strict=True):
        expected = generate(model, tokenizer, prompt, max_new_tokens=order.max_tokens).text
        assert "".join(piece.text for piece in pieces) == expected
        assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert (pieces[-1].finish_reason, pieces[-1].generated) == ("length", order.max_tokens)
    model.foregate.close()


def test_an_order_that_fails_leaves_the_others_alone(batcher: Batcher) -> None:
    good = Order(PROMPT, max_tokens=12)
    bad = Order(PROMPT, max_tokens=12, sampling=Sampling(1.0, repetition_penalty=1e-44))  # logits overflow
    (alone,) = results(batcher, [good])
    beside, failed = results(batcher, [good, bad])
    assert beside == alone
    assert "choosing a token failed" in failed[-1].error
    assert batcher.load() == {"running": 0, "waiting": 0}


def test_places_are_counted_from_reservation_to_the_last_piece(batcher: Batcher) -> None:
    batcher.reserve(3)
    with pytest.raises(Overloaded):
        batcher.reserve(2)
    batcher.release(3)
    results(batcher, [Order(PROMPT, max_tokens=2)] * 4)
    batcher.reserve(4)  # all are free again, at once
    batcher.release(4)


def test_closing_ends_what_is_unfinished_with_an_error(batcher: Batcher) -> None:
    pieces, ended = [], threading.Event()
    batcher.reserve(1)
    batcher.submit(Order(PROMPT, max_tokens=100_000), lambda piece: (pieces.append(piece), piece.last and ended.set()))
    batcher.close()
    assert ended.wait(1)
    assert pieces[-1].error == "the server is shutting down"
    with pytest.raises(Overloaded):
        batcher.reserve(1)
