"""A report's text is JSON for whatever it holds, with rows of numbers on one line."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from foregate.report.files import to_text

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('[]{}"\\\n ,a', max_size=6)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("[] a"), inner))


@given(st.dictionaries(st.text("[]a"), VALUES, max_size=4))
def test_text_is_what_it_was_made_of(report: dict[str, Any]) -> None:
    assert json.loads(to_text(report)) == report


def test_rows_take_one_line() -> None:
    assert '  [1, 2.5, "late"],\n  [3]\n' in to_text({"loads": [[1, 2.5, "late"], [3]]})
