"""Cut the routing that `foregate plan` simulates with out of traces of the demo models.

    python benchmarks/plan_routing.py mixtral-tiny TRACE GATES qwen3-moe-tiny TRACE GATES

The traces are of held-out text (`foregate trace`), the gates those of the demo folders. Prints how far simulated speeds
with the stored probabilities are from those with the gates themselves.
"""

import sys
from pathlib import Path

import foregate.planner.routing as routing
from foregate.lookahead.gates import LookaheadGates
from foregate.lookahead.trace import Trace
from foregate.schedule import make_scheduler
from foregate.simulate import Machine, run
from foregate.simulate.workload import Workload

TOKENS, WARM_UP = 128, 32


def main() -> None:
    names = sys.argv[1:]
    for name, folder, gates in zip(*(names[start::3] for start in range(3)), strict=True):
        trace = Trace(folder)
        workload = Workload(trace, LookaheadGates.load(Path(gates), trace.layers), slice(0, TOKENS))
        path = Path(routing.__file__).with_name(f"{name}.safetensors")
        routing.save_routing(path, workload.calls("lookahead"), workload.shape)
        machine = Machine(10_000_000, 2e9, layer_seconds=0.002, expert_seconds=0.001)
        for share in (0.25, 0.5):
            slots = int(share * workload.num_experts)
            speeds = [
                run(calls, make_scheduler("lookahead", slots, workload.shape, None), machine, WARM_UP).tokens_per_second
                for calls in (workload.calls("lookahead"), routing.load_routing(name).calls)
            ]
            print(f"{name}, {share:.0%}: {speeds[0]:.2f} tokens/s with the gates, {speeds[1]:.2f} as stored")


if __name__ == "__main__":
    main()
