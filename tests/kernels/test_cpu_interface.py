"""The binding: settings, errors, threads and forks."""

import os
import threading
from dataclasses import replace

import pytest
import torch
from matrices import ISAS, random_matrix, random_tokens, running_on, running_with

import foregate
from foregate import ForegateError
from foregate.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())

EXPERT = cpu.Expert(random_matrix(4, 96, 64), random_matrix(4, 64, 48))
ROWS = torch.arange(2)


def test_facts():
    assert cpu.why_not() == ""
    assert cpu.version() == foregate.__version__
    assert cpu.isas() == ISAS and cpu.isa() in ISAS
    with running_on(ISAS[-1]), running_with(3):
        assert cpu.isa() == ISAS[-1] and cpu.threads() == 3


def test_isa_from_the_environment(monkeypatch):
    before = cpu.isa()
    try:
        monkeypatch.setenv("FOREGATE_ISA", ISAS[-1])
        cpu._load.cache_clear()
        assert cpu.available() and cpu.isa() == ISAS[-1]
        monkeypatch.setenv("FOREGATE_ISA", "pentium")
        cpu._load.cache_clear()
        with pytest.raises(ForegateError, match=r"FOREGATE_ISA.*pentium.*scalar|FOREGATE_ISA.*pentium.*neon"):
            cpu.available()
    finally:
        monkeypatch.delenv("FOREGATE_ISA")
        cpu._load.cache_clear()
        cpu.use_isa(before)


def test_without_library(monkeypatch):
    monkeypatch.setattr(foregate, "__path__", ["/nowhere"])
    cpu._load.cache_clear()
    try:
        assert not cpu.available()
        assert "install it again" in cpu.why_not()
        with pytest.raises(ForegateError, match="install it again"):
            cpu.matmul(torch.zeros(1, 64), EXPERT.up)
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def test_library_of_other_sources(monkeypatch):
    monkeypatch.setattr(cpu, "_INTERFACE", 0)
    cpu._load.cache_clear()
    try:
        assert "built from other sources" in cpu.why_not()
    finally:
        monkeypatch.undo()
        cpu._load.cache_clear()


def test_unknown_settings():
    with pytest.raises(ValueError, match="pentium"):
        cpu.use_isa("pentium")
    with pytest.raises(ValueError, match="number of threads"):
        cpu.set_threads(0)
    for parameters in ({"function": "swish"}, {"layout": "sideways"}, {"limit": -1.0}, {"limit": float("nan")}):
        with pytest.raises(ValueError, match="swish|sideways|limit"):
            cpu.Activation(**parameters)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 63), "shape"),
        (torch.zeros(64), "shape"),
        (torch.zeros(2, 64, dtype=torch.bfloat16), "float32"),
        (torch.zeros(64, 2).T, "contiguous"),
        (torch.zeros(2, 64, device="meta"), "meta"),
    ],
)
def test_bad_tokens(x, message):
    with pytest.raises(ValueError, match=message):
        cpu.matmul(x, EXPERT.up)
    with pytest.raises(ValueError, match=message):
        cpu.expert_mlp(x, EXPERT, cpu.Activation())


def test_bad_matrices():
    x = torch.zeros(1, 64)
    good = EXPERT.up
    missing = replace(good, planes={k: v for k, v in good.planes.items() if k != "zeros"})
    short = replace(good, planes={**good.planes, "low": good.planes["low"][:, :, :-1].contiguous()})
    for matrix, message in (
        (missing, "zeros"),
        (short, "'low' has shape"),
        (replace(good, bits=5), "not 5"),
        (torch.zeros(8, 64, dtype=torch.int8), "int8"),
        (torch.zeros(64), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.matmul(x, matrix)


def test_bad_work():
    x, y = torch.zeros(2, 64), torch.zeros(2, 64)
    other = cpu.Expert(random_matrix(4, 192, 64), random_matrix(4, 64, 96))
    for work, message in (
        ([cpu.Work(EXPERT, ROWS + 1, ROWS)], "source"),
        ([cpu.Work(EXPERT, ROWS - 1, ROWS)], "source"),
        ([cpu.Work(EXPERT, ROWS, ROWS + 1)], "destination"),
        ([cpu.Work(EXPERT, ROWS, ROWS - 1)], "destination"),
        ([cpu.Work(EXPERT, ROWS, ROWS[:1])], "destinations"),
        ([cpu.Work(EXPERT, ROWS.int(), ROWS)], "int64"),
        ([cpu.Work(EXPERT, ROWS, ROWS, torch.ones(3))], "weights"),
        ([cpu.Work(replace(EXPERT, up_bias=torch.zeros(5)), ROWS, ROWS)], "bias"),
        ([cpu.Work(replace(EXPERT, down=random_matrix(4, 64, 47)), ROWS, ROWS)], "fit together"),
        ([cpu.Work(EXPERT, ROWS, ROWS), cpu.Work(other, ROWS, ROWS)], "different shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.moe(x, work, cpu.Activation(), y)


def test_several_python_threads():
    matrix, x = random_matrix(4, 300, 500), random_tokens(4, 500)
    expected, wrong = cpu.matmul(x, matrix), []

    def call() -> None:
        wrong.extend(i for i in range(30) if not torch.equal(cpu.matmul(x, matrix), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_after_a_fork():
    matrix, x = random_matrix(4, 300, 500), random_tokens(1, 500)
    with running_with(3):
        expected = cpu.matmul(x, matrix)
        child = os.fork()
        if child == 0:
            os._exit(0 if cpu.threads() == 3 and torch.equal(cpu.matmul(x, matrix), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(cpu.matmul(x, matrix), expected)
