"""Run M11 and print at the end how many programs jax had to compile; see test_m11.py.

python tests/experiments/m11_counting_compilations.py [flags of m11_interleave.py]
"""

import collections
import pathlib
import runpy

import jax

REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
HITS = "/jax/compilation_cache/cache_hits"

if __name__ == "__main__":
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **facts: events.update([event]))
    script = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "m11_interleave.py"
    runpy.run_path(str(script), run_name="__main__")
    print(f"JAX COMPILED {events[REQUESTS] - events[HITS]} OF {events[REQUESTS]} PROGRAMS", flush=True)
