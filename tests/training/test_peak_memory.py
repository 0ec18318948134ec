import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "remat"), [("packed", "products"), ("padded", "full")])
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not forget peaks")
def test_an_update_uses_the_memory_that_the_compiler_announced(
    rows: str, remat: str, unoptimised: dict[str, str]
) -> None:
    script = Path(__file__).parent / "peak_memory.py"
    command = [sys.executable, str(script), rows, remat, "small"]
    # Each thread of a matmul packs its operands into memory of its own, which the compiler does not count: with the
    # threads of 32 cores a tenth of the peak.
    environment = os.environ | unoptimised | {"NPROC": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)
    print(memory)
    assert abs(memory["taken"] - memory["announced"]) < 0.1 * memory["announced"]
