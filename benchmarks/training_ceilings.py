"""Measure XLA's matmul speed in the shapes of an update and print one JSON line; it runs as a separate process."""

import json

from inference_ceilings import CUBE, MATMULS, NUM_LAYERS, seconds_per_matmul

# The rows of workload D: 8 sequences of 256 tokens.
ROWS = 2048


def main() -> None:
    rates = {f"{CUBE}^3": 2 * CUBE**3 / seconds_per_matmul(CUBE, CUBE, CUBE, 1, "float32")}
    seconds = flop = 0.0
    for (size_in, size_out), count in MATMULS.items():
        seconds += count * seconds_per_matmul(ROWS, size_in, size_out, min(count, NUM_LAYERS), "float32")
        flop += count * 2 * ROWS * size_in * size_out
    print(json.dumps(rates | {f"all products of a forward pass, {ROWS} rows": flop / seconds}))


if __name__ == "__main__":
    main()
