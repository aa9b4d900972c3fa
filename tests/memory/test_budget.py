"""What the memory dial means, at its edges."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.memory.budget import divide, divide_host
from foregate.memory.needs import Needs
from foregate.sizes import format_bytes, parse_bytes, whole_mib

MIB = 2**20
NEEDS = Needs(
    runtime=400 * MIB, backbone=90 * MIB, gates=3 * MIB, kv_cache=5 * MIB, transients=MIB, buffers=MIB, loading=4 * MIB
)  # 500 MiB in all


@pytest.fixture(scope="module")
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))  # 24 experts, top-2


@pytest.mark.parametrize(("memory", "slots"), [("100%", 24), ("50%", 12), ("25 %", 6), ("8.4%", 2), ("12.5%", 3)])
def test_share_of_the_experts(opened: Store, memory: str, slots: int) -> None:
    assert divide(memory, opened, NEEDS).slots == slots


def test_bytes_hold_everything(opened: Store) -> None:
    granted = 500 * MIB + 5 * opened.record_bytes + 17
    budget = divide(str(granted), opened, NEEDS)
    assert budget.slots == 5
    assert granted - opened.record_bytes < budget.total_bytes <= granted
    assert divide("8GiB", opened, NEEDS).slots == 24  # never more than there is


@pytest.mark.parametrize("memory", ["1%", "1000", "500MiB"])
def test_too_small_names_the_smallest_that_works(opened: Store, memory: str) -> None:
    with pytest.raises(ForegateError, match="one layer needs 2 of the model's 24 experts") as caught:
        divide(memory, opened, NEEDS)
    smallest = str(caught.value).rpartition("--memory ")[2]
    assert 2 <= divide(smallest, opened, NEEDS).slots <= 2 + MIB // opened.record_bytes


def test_too_small_says_what_takes_the_room(opened: Store) -> None:
    with pytest.raises(ForegateError, match="beside runtime 400 MiB, backbone 90 MiB, kv cache 5.0 MiB, gates 3.0 MiB"):
        divide("300MiB", opened, NEEDS)


def test_a_model_that_is_largest_while_it_is_read_needs_that_much(opened: Store) -> None:
    heavy = replace(NEEDS, loading=300 * MIB)
    with pytest.raises(ForegateError, match="smallest that works is --memory 790MiB"):
        divide("600MiB", opened, heavy)
    assert divide("790MiB", opened, heavy).total_bytes == 790 * MIB


@pytest.mark.parametrize("memory", ["100%", "8GiB"])
def test_more_than_there_is_names_the_largest_that_works(opened: Store, memory: str) -> None:
    free = 502 * MIB
    opened_large = _with_larger_records(opened)
    with pytest.raises(ForegateError, match="are free .*runtime 400 MiB") as caught:
        divide(memory, opened_large, NEEDS, free=free)
    largest = str(caught.value).rpartition("--memory ")[2]
    assert divide(largest, opened_large, NEEDS, free=free).total_bytes <= free


def test_a_model_that_cannot_fit_is_refused(opened: Store) -> None:
    with pytest.raises(ForegateError, match="too little for this model .*: take a shorter --context"):
        divide("100%", opened, NEEDS, free=400 * MIB)


def _with_larger_records(store: Store) -> Store:
    class Large(Store):
        record_bytes = MIB

    return Large(store.path)


def test_the_host_keeps_the_records_that_fit(opened: Store) -> None:
    free = 500 * MIB + 7 * opened.record_bytes
    assert divide_host(None, opened, NEEDS, free=free).records == 7
    assert divide_host(None, opened, NEEDS).records == 24
    assert divide_host("25%", opened, NEEDS, free=free).records == 6
    assert divide_host(str(3 * opened.record_bytes), opened, NEEDS, least=3).records == 3
    smallest = 2 * opened.record_bytes
    for memory, free_bytes, what in (
        (smallest - 1, None, f"--host-memory {smallest - 1}"),
        (None, 0, "the free host memory"),
    ):
        with pytest.raises(ForegateError, match=f"^{what} is too small: .* --host-memory {smallest}$"):
            divide_host(memory, opened, NEEDS, least=2, free=free_bytes)
    with pytest.raises(
        ForegateError, match=r"only .* of host memory are free; the largest that works is --host-memory \d+MiB$"
    ):
        divide_host("50%", opened, NEEDS, free=free)


@pytest.mark.parametrize("memory", ["lots", "", "-5%", "0%", "101%", "5 parsecs", "%", "1e9", "nan%", "8GiB8"])
def test_not_a_size(opened: Store, memory: str) -> None:
    with pytest.raises(ForegateError, match="--memory"):
        divide(memory, opened, NEEDS)


@pytest.mark.parametrize(
    ("text", "expected"), [("8GiB", 8 * 2**30), ("1.5 gb", 1_500_000_000), ("512MiB", 2**29), ("7", 7), ("3KB", 3000)]
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--size") == expected


@pytest.mark.parametrize(
    ("nbytes", "text"), [(12345 * MIB, "12.06 GiB"), (717 * MIB, "717 MiB"), (3 * MIB // 2, "1.5 MiB"), (0, "0.0 MiB")]
)
def test_bytes_for_a_person(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_whole_mebibytes_are_rounded_up() -> None:
    assert parse_bytes(whole_mib(5 * MIB + 1), "--size") == 6 * MIB


def test_what_is_not_a_size_is_named_with_its_option() -> None:
    with pytest.raises(ForegateError, match=r"^--link-bandwidth fast is not a size: write bytes such as"):
        parse_bytes("fast", "--link-bandwidth")
