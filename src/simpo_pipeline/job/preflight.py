"""`--preflight TOPOLOGY`: compile the programs of a job for a slice that this machine does not have.

Nothing is launched, fetched or paid for. Exit code 0 means that all programs compile and fit.
"""

import sys
from typing import NoReturn

from simpo_pipeline.errors import ConfigError, SimpoPipelineError
from simpo_pipeline.executor.main import FAILED, log_lines, usage_errors_reported
from simpo_pipeline.job.preflight_job import PreflightFlags, PreflightJob
from simpo_pipeline.preflight.topology import describe_devices, find_topology
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join


def preflight_main(job: PreflightJob, flags: PreflightFlags) -> NoReturn:
    """Print the report, write it to `{prefix}/preflight-{topology}.json`, and exit with its verdict."""
    with usage_errors_reported():
        try:
            fits = preflight(job, flags.preflight or "", flags.effective_prefix)
        except ConfigError:
            raise
        except SimpoPipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(FAILED) from error
    raise SystemExit(0 if fits else FAILED)


def preflight(job: PreflightJob, topology_name: str, prefix: str) -> bool:
    """Print and write the report, and return whether the job can run on the topology.

    Raises:
        ConfigError: The compiler is not installed, or the job's shapes are not known in advance.
    """
    topology = find_topology(topology_name)
    devices = describe_devices(topology)
    # Imported here because planning must not import jax.
    from simpo_pipeline.distributed.programs import forbid_strays
    from simpo_pipeline.job.preflight_plan import examine_job
    from simpo_pipeline.preflight.report import as_json, as_text

    forbid_strays()
    with log_lines(to_stderr=True):
        report = examine_job(job, topology, devices)
    path = join(prefix, f"preflight-{topology.name}.json")
    write_json(path, as_json(report))
    print(f"{as_text(report)}\nWritten to {path}.", flush=True)
    return not report.failures
