"""Whatever the OpenAPI description allows, and much that it does not: never a 5xx (`make test-slow` installs schemathesis)."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from live_server import Live

pytestmark = pytest.mark.slow
schemathesis = pytest.importorskip("schemathesis")
SETTINGS = settings(
    max_examples=50,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failing request is small enough as it is
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_gives_a_5xx(start: Callable[..., Live], mode: str) -> None:
    live, statuses = start(context=48), set()
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")

    def try_out(operation: Any) -> None:
        @SETTINGS
        @given(case=operation.as_strategy(schemathesis.GenerationMode(mode)))
        def check(case: Any) -> None:
            answer = case.call(base_url=live.url, timeout=60)
            statuses.add(answer.status_code)
            assert answer.status_code < 500, answer.text

        check()

    for operation in (result.ok() for result in schema.get_all_operations()):
        if mode == "positive" or operation.body:  # else nothing can be wrong
            try_out(operation)
    assert (200 if mode == "positive" else 400) in statuses
    assert live.get("/health").status == 200
    assert live.idle_within(20)
