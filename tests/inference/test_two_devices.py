import json
import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_devices_give_the_tokens_of_one_and_shard_the_cache_if_heads_divide(
    python: list[str], unoptimised: dict[str, str]
) -> None:
    script = Path(__file__).with_name("two_devices.py")
    done = subprocess.run(
        [*python, str(script)], env=os.environ | unoptimised | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    (one, two), (one_uneven, two_uneven) = results["served"]
    assert two["tokens"] == one["tokens"]
    assert two_uneven["tokens"] == one_uneven["tokens"]
    assert two["cache_bytes"] == one["cache_bytes"] / 2
    assert two_uneven["cache_bytes"] == one_uneven["cache_bytes"]
    assert all(alone == split for alone, split in results["attended"])
    assert [model["tokens"] for model in results["by_layer"]] == [one["tokens"], one_uneven["tokens"]]
