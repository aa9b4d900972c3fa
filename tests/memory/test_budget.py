"""What the memory dial means, at its edges."""

from collections.abc import Callable
from pathlib import Path

import pytest

from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.memory.budget import divide
from foregate.sizes import parse_bytes

BACKBONE = 1_000_000


@pytest.fixture(scope="module")
def opened(store: Callable[[str], Path]) -> Store:
    return Store(store("mixtral"))  # 24 experts, top-2


@pytest.mark.parametrize(("memory", "slots"), [("100%", 24), ("50%", 12), ("25 %", 6), ("8.4%", 2), ("12.5%", 3)])
def test_share_of_the_experts(opened: Store, memory: str, slots: int) -> None:
    assert divide(memory, opened, BACKBONE).slots == slots


def test_bytes_hold_backbone_and_experts(opened: Store) -> None:
    budget = divide(str(BACKBONE + 5 * opened.record_bytes + 17), opened, BACKBONE)
    assert budget.slots == 5
    assert budget.total_bytes <= BACKBONE + 5 * opened.record_bytes + 17
    assert divide("8GiB", opened, BACKBONE).slots == 24  # never more than there is


@pytest.mark.parametrize("memory", ["1%", "1000", "0.9MB"])
def test_too_small_names_the_smallest_that_works(opened: Store, memory: str) -> None:
    with pytest.raises(ForegateError, match="one layer needs 2 of the model's 24 experts") as caught:
        divide(memory, opened, BACKBONE)
    smallest = str(caught.value).rpartition("--memory ")[2]
    assert divide(smallest, opened, BACKBONE).slots == 2


@pytest.mark.parametrize("memory", ["lots", "", "-5%", "0%", "101%", "5 parsecs", "%", "1e9", "nan%", "8GiB8"])
def test_not_a_size(opened: Store, memory: str) -> None:
    with pytest.raises(ForegateError, match="--memory"):
        divide(memory, opened, BACKBONE)


@pytest.mark.parametrize(
    ("text", "expected"), [("8GiB", 8 * 2**30), ("1.5 gb", 1_500_000_000), ("512MiB", 2**29), ("7", 7), ("3KB", 3000)]
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--size") == expected


def test_what_is_not_a_size_is_named_with_its_option() -> None:
    with pytest.raises(ForegateError, match=r"^--link-bandwidth fast is not a size: write bytes such as"):
        parse_bytes("fast", "--link-bandwidth")
