"""Live comparisons on this machine: policies interleaved, the paper's ladder, the simulator against the engine."""
