"""Plans: what they add up to, what they refuse, and how fast they say a model will be."""

from pathlib import Path

import pytest
from transformers import MixtralConfig

import foregate
from foregate.checkpoint.store import Store
from foregate.errors import ForegateError
from foregate.planner.plan import _largest
from foregate.planner.routing import NAMES, load_routing
from foregate.schedule import make_scheduler
from foregate.simulate import Machine, run
from foregate.simulate.presets import preset

DEMO = Path(__file__).parents[2] / "demo"
GIB = 2**30


@pytest.fixture(scope="module")
def mixtral_8x7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model of 47 billion parameters, and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    MixtralConfig(max_position_embeddings=131072).save_pretrained(folder)
    return folder


def test_a_large_model_from_its_configuration_alone(mixtral_8x7b: Path) -> None:
    found = foregate.plan(mixtral_8x7b, "16GiB", context=8192, bits=4)
    budget, widths = found.budget, {width.bits: width for width in found.widths}
    assert found.memory_bytes <= 16 * GIB
    assert budget.slots == (16 * GIB - budget.needs.total) // budget.slot_bytes > 0
    weights = 3 * 4096 * 14336
    assert widths[16].record_bytes == 2 * weights
    assert widths[4].record_bytes == pytest.approx(weights * (4 + 16 / 64) / 8, rel=0.001)  # codes, scale and zero
    assert widths[16].slots < widths[8].slots < widths[4].slots < widths[3].slots < widths[2].slots
    assert budget.needs.kv_cache == 8192 * 32 * 2 * 8 * 128 * 4
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert budget.needs.backbone == 4 * attention
    assert 8192 < found.largest_context < 131072
    with pytest.raises(ForegateError, match="smallest that works"):
        foregate.plan(mixtral_8x7b, "16GiB", context=found.largest_context + 1024, bits=4)


def test_a_card_holds_slots_and_the_host_records(mixtral_8x7b: Path) -> None:
    found = foregate.plan(mixtral_8x7b, "12GiB", host_memory="16GiB", device="cuda", context=4096)
    host = found.budget.host
    assert found.memory_bytes <= 12 * GIB
    assert found.budget.slots < host.records < 256
    assert host.records == 16 * GIB // host.record_bytes
    assert found.budget.needs.kv_cache == 4096 * 32 * 2 * 8 * 128 * 2  # bfloat16


def test_parts_add_up(demo_store: Path) -> None:
    found = foregate.plan(demo_store, "50%").to_json()
    opened = Store(demo_store)
    assert sum(found["parts"].values()) == max(found["memory_bytes"], found["loading_bytes"])
    assert found["parts"]["slots"] == found["slots"] * opened.record_bytes == 48 * opened.record_bytes
    assert found["parts"]["gates"] == (demo_store / "lookahead.safetensors").stat().st_size
    assert (found["bits"], found["policy"], found["largest_context"]) == (4, "lookahead", 1024)
    assert foregate.plan(demo_store, "50%", policy="lru").budget.needs.gates == 0


@pytest.mark.parametrize("sequences", [1, 3])
def test_load_divides_as_planned(demo_store: Path, sequences: int) -> None:
    # Not with gates: reading them takes more than this model's experts.
    wanted = {"context": 64, "prompt": 8, "sequences": sequences, "policy": "lru"}
    budget = foregate.plan(demo_store, "25%", **wanted).budget
    granted = budget.needs.total + 80 * budget.slot_bytes
    planned = foregate.plan(demo_store, granted, **wanted)
    model = foregate.load(demo_store, memory=granted, **wanted)
    model.foregate.close()
    assert planned.budget == model.foregate.budget
    assert planned.budget.slots == 80


def test_every_sequence_has_a_cache_and_one_of_them_reads_its_own(mixtral_8x7b: Path) -> None:
    one, four = (foregate.plan(mixtral_8x7b, "25%", context=8192, sequences=count, policy="lru") for count in (1, 4))
    assert four.budget.needs.kv_cache == 4 * one.budget.needs.kv_cache
    assert four.speed == one.speed  # of decoding one sequence, with as many experts
    assert four.to_json()["session"]["sequences"] == 4


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    model = DEMO / "mixtral-tiny"
    with pytest.raises(ForegateError, match=r"too small: .* beside runtime .* smallest that works is --memory \d+MiB$"):
        foregate.plan(model, "100MiB")
    widths = {width.bits: width for width in foregate.plan(model, "25%").widths}
    with pytest.raises(ForegateError, match=r"smallest that works is --memory \d+MiB, or --bits 3 or --bits 2$"):
        foregate.plan(model, widths[3].smallest_bytes, bits=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "unknown device tpu: choose one of cpu, cuda"),
        ({"host_memory": "8GiB"}, "on the CPU --memory says it all"),
        ({"bits": 5}, "--bits 5: choose one of 16, 8, 4, 3, 2"),
        ({"backbone_bits": 3}, "--backbone-bits 3: choose one of 16, 8, 4"),
        ({"policy": "best"}, "unknown policy best"),
        ({"machine": "nowhere.json"}, "--machine nowhere.json cannot be read"),
        ({"machine": {"measured": {}}}, "no measurements for cpu"),
        ({"context": 0}, "at least 1 each"),
        ({"sequences": 0}, "at least 1 each"),
    ],
)
def test_impossible_wishes(options: dict, message: str) -> None:
    with pytest.raises(ForegateError, match=message):
        foregate.plan(DEMO / "mixtral-tiny", "25%", **options)


def test_a_store_has_its_bits(demo_store: Path, tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match="is a store of 4 bits"):
        foregate.plan(demo_store, "25%", bits=3)
    with pytest.raises(ForegateError, match=r"has no config\.json"):
        foregate.plan(tmp_path, "25%")
    with pytest.raises(ForegateError, match="no such folder: ./nowhere"):
        foregate.plan("./nowhere", "25%")


@pytest.mark.parametrize("room", [10**9, 5 * 10**9, 13 * 10**9])
def test_the_largest_context_of_a_bent_line(room: int) -> None:
    def total(context: int) -> int:
        return 100_000 * context + (context * context >> 4)

    largest = _largest(total, room, 4096, 131_072)
    assert total(largest) <= room < total(largest + 64)
    assert _largest(total, 10**12, 4096, 5000) == 5000


def speed(**options: object) -> float:
    figures = {"memory_bandwidth": 20e9, "link_bandwidth": 1e9} | options
    memory = figures.pop("memory", "25%")
    return foregate.plan(DEMO / "mixtral-tiny", memory, **figures).speed.expected


def test_speed_follows_memory_and_link() -> None:
    slow_link, fast_link = speed(link_bandwidth=5e6), speed(link_bandwidth=5e9)
    assert slow_link < 0.5 * fast_link
    assert slow_link < speed(link_bandwidth=5e6, memory="50%") < speed(link_bandwidth=5e6, memory="100%")
    assert speed(link_bandwidth=5e6, policy="lru") < slow_link
    assert speed(memory="100%", memory_bandwidth=1e8) < 0.5 * speed(memory="100%")


def test_a_speed_is_a_range_and_names_its_routing() -> None:
    found = foregate.plan(DEMO / "qwen3-moe-tiny", "25%").speed
    assert found.low < found.expected < found.high
    assert found.routing == "qwen3-moe-tiny"
    assert foregate.plan(DEMO / "mixtral-tiny", "25%").speed.routing == "mixtral-tiny"


def test_a_plan_and_a_projection_take_a_card_alike(mixtral_8x7b: Path) -> None:
    routing, card = load_routing("mixtral-tiny"), preset("mixtral-8x7b-4bit-24gb-pcie4")
    for policy in ("lru", "lookahead"):
        scheduler = make_scheduler(policy, 72, routing.shape)
        projected = run(routing.calls, scheduler, card.machine(routing.shape), 32).tokens_per_second
        options = {"device": "cuda", "memory_bandwidth": 936e9, "context": 64, "policy": policy, "bits": 4}
        planned = foregate.plan(mixtral_8x7b, "75%", **options).speed
        assert planned.expected == pytest.approx(projected / card.time_scale(routing.shape), rel=0.02)


def test_what_only_the_disk_has_is_slower(mixtral_8x7b: Path) -> None:
    def plan(host_memory: str, **measured: dict) -> foregate.Plan:
        bandwidths = {"device_memory": (936e9, 0), "device_link": (24e9, 1e-5), **measured}
        found = {name: {"bytes_per_second": b, "latency_seconds": s} for name, (b, s) in bandwidths.items()}
        options = {"device": "cuda", "policy": "lru", "context": 64, "machine": {"measured": found}}
        return foregate.plan(mixtral_8x7b, "50%", host_memory=host_memory, **options)

    everything, half, none = plan("100%"), plan("50%"), plan("1%")
    assert (everything.records_on_disk, half.records_on_disk) == (0, 128)
    assert none.speed.expected < 0.7 * half.speed.expected < 0.3 * everything.speed.expected
    seconds = [1 / found.speed.expected for found in (everything, half, none)]
    assert seconds[1] == pytest.approx((seconds[0] + seconds[2]) / 2, rel=0.05)
    as_fast = plan("50%", disk=(24e9, 1e-5))
    assert as_fast.speed == everything.speed


def test_a_width_whose_records_the_host_has_no_room_for_has_no_speed(mixtral_8x7b: Path) -> None:
    found = foregate.plan(mixtral_8x7b, "50%", host_memory="100MiB", device="cuda")
    speeds = {width.bits: width.speed for width in found.widths}
    assert speeds[16] is speeds[8] is None
    assert speeds[4] == found.speed


@pytest.mark.parametrize("name", NAMES)
def test_routing_is_whole_tokens_with_predictions_worth_listening_to(name: str) -> None:
    routing = load_routing(name)
    layers = len(routing.shape.experts)
    assert [call.layer for call in routing.calls] == list(range(layers)) * 128
    hits, chosen = 0, 0
    for call, following in zip(routing.calls, routing.calls[1:], strict=False):
        layer, probabilities = call.after.ahead[0]
        assert layer == following.layer
        best = probabilities.argsort()[-len(following.experts) :]
        hits, chosen = hits + len(set(best) & set(following.experts)), chosen + len(following.experts)
    assert hits / chosen > 0.6  # chance is a quarter and an eighth


def test_routing_without_predictions_is_slower() -> None:
    routing = load_routing("mixtral-tiny")
    machine = Machine(10_000_000, 2e9, layer_seconds=0.002, expert_seconds=0.001)
    speeds = [
        run(routing.calls, make_scheduler(policy, 24, routing.shape), machine, 32).tokens_per_second
        for policy in ("lru", "lookahead")
    ]
    assert speeds[0] < 0.9 * speeds[1]
