"""How fast XLA multiplies matrices in the shapes of an update; prints one JSON line. A process of its own."""

import json

from inference_ceilings import CUBE, NUM_LAYERS, PRODUCTS, seconds_a_product

# The rows of workload D: 8 sequences of 256 tokens.
ROWS = 2048


def main() -> None:
    rates = {f"{CUBE}^3": 2 * CUBE**3 / seconds_a_product(CUBE, CUBE, CUBE, 1, "float32")}
    seconds = flop = 0.0
    for (size_in, size_out), count in PRODUCTS.items():
        seconds += count * seconds_a_product(ROWS, size_in, size_out, min(count, NUM_LAYERS), "float32")
        flop += count * 2 * ROWS * size_in * size_out
    print(json.dumps(rates | {f"all products of a forward pass, {ROWS} rows": flop / seconds}))


if __name__ == "__main__":
    main()
