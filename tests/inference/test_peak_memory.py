import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not forget peaks")
def test_an_engine_takes_as_much_memory_as_it_announced(dtype: str) -> None:
    script = Path(__file__).parent / "peak_memory.py"
    done = subprocess.run([sys.executable, str(script), dtype], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)
    print(memory)
    assert abs(memory["taken"] - memory["announced"]) < 0.05 * memory["announced"]
