"""Profiler trace of one update: `--profile STEP`."""

import contextlib
import pathlib
import tempfile
from collections.abc import Generator

import jax

from simpo_pipeline.storage.output_folder import OutputFolder


@contextlib.contextmanager
def profiled(output: OutputFolder, process_index: int) -> Generator[None]:
    """Trace the `with` block into `profile/process-N` of a step's outputs, for TensorBoard or Perfetto."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        root = pathlib.Path(folder)
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            output.upload(file, f"profile/process-{process_index}/{file.relative_to(root).as_posix()}")
