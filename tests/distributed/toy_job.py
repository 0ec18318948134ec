"""Job with the structure of M11 and toy programs, with an optional fault in one process.

    python infra/launch.py --local 2 -- python tests/distributed/toy_job.py --prefix P [--fault NAME] [--victim I]

train-2 ==live==> infer (borrows) ==> train-5 (takes). The state is one array that is sharded over all devices of the
job. An update is one program over all devices. A generation is several programs on the devices of each host alone. The
victim prints a line right before the fault, so that a test knows when the fault happened.
"""

import dataclasses
import hashlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from simpo_pipeline.executor.main import executor_main, parse_main_config
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import THIS_OUTPUT_PATH, ExecutorStep, borrow, take, versioned
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.joining import joined_job
from simpo_pipeline.job.session import session_of
from simpo_pipeline.processes import joint_digest
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join
from simpo_pipeline.tracking.tracker import NoTracker

SIZE = 48


@dataclasses.dataclass(frozen=True)
class ToyFlags(JobFlags):
    """Flags of the toy job. The fault `fault` happens only in process `victim`."""

    fault: str = "none"
    victim: int = 0
    fault_step: str = "train-5"


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Config of a toy step. `stop` counts updates over the whole run. The fault is not part of the identity."""

    stop: int
    fault: Callable[..., None]
    live: Any = None
    output_path: str = THIS_OUTPUT_PATH


class Toy:
    """Live value: an array that is sharded over all devices, and its update programs."""

    def __init__(self, programs: Any) -> None:
        import jax
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        from simpo_pipeline.distributed.mesh import DATA_AXIS, place, training_mesh

        self.mesh = training_mesh()
        sharding = NamedSharding(self.mesh, PartitionSpec(DATA_AXIS))
        self.abstract = jax.ShapeDtypeStruct((SIZE,), np.float32, sharding=sharding)
        self.sharding = sharding
        self.array = place(np.arange(SIZE, dtype=np.float32), sharding)
        self.num_updates = 0
        self.programs = programs
        self.update = self.compile("update", 0.5)
        self.other_update = self.compile("other_update", 0.25)

    def compile(self, name: str, factor: float) -> Any:
        """Compile an update that needs every device: each element moves towards the mean of the whole array."""
        return self.programs.compile(
            name, lambda x: x - factor * (x - x.mean()), self.abstract, donate_argnums=(0,), out_shardings=self.sharding
        )

    def digest(self) -> str:
        """Return the SHA-256 of the shards of this process and the number of updates."""
        import numpy as np

        parts = [np.asarray(shard.data).tobytes() for shard in self.array.addressable_shards]
        return hashlib.sha256(b"".join([*parts, str(self.num_updates).encode()])).hexdigest()


def train(config: ToyConfig, run: StepRun) -> Live:
    """Update the state until `stop` updates are made."""
    session = session_of(run)
    toy: Toy = config.live or Toy(session.programs)
    tracker = session.tracker if run.processes.is_leader else NoTracker()
    while toy.num_updates < config.stop:
        if config.fault(run, toy, "before an update") == "skip":
            break
        update = toy.other_update if config.fault(run, toy, "which update") == "other" else toy.update
        toy.array = update(toy.array)
        toy.array.block_until_ready()
        toy.num_updates += 1
        tracker.log({"updates": toy.num_updates}, step=toy.num_updates)
    digest = joint_digest(run.processes.gather(toy.digest()))
    if run.processes.is_leader:
        write_json(join(config.output_path, "summary.json"), {"state_digest": digest, "step": toy.num_updates})
    return Live(toy, digest=digest)


def infer(config: ToyConfig, run: StepRun) -> None:
    """Launch 3 programs on the devices of this host, and 2 more for each earlier host."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from simpo_pipeline.distributed.mesh import MODEL_AXIS, local_mesh, place

    sharding = NamedSharding(local_mesh(), PartitionSpec(MODEL_AXIS))
    abstract = jax.ShapeDtypeStruct((SIZE,), np.float32, sharding=sharding)
    generate = session_of(run).programs.compile("generate", lambda x: x + x.mean(), abstract, out_shardings=sharding)
    x = place(np.ones(SIZE, np.float32), sharding)
    for _ in range(3 + 2 * run.processes.process_index):
        x = generate(x).block_until_ready()
        config.fault(run, config.live, "between rounds")
        run.processes.watch.check_peers()
    run.processes.gather("rows are written")
    if run.processes.is_leader:
        write_json(join(config.output_path, "summary.json"), {"mean": float(np.asarray(x).mean())})


class DeviceTracker(NoTracker):
    """Tracker that runs a JAX operation while it logs, as that of the first attempt did for every metric."""

    def log(self, metrics: Any, *, step: int) -> None:
        if step == 3:
            say("a tracker does device work")
            import jax.numpy as jnp

            jnp.zeros(())


class SlowTracker(NoTracker):
    """Tracker with a slow upload at the end."""

    def finish(self, error: BaseException | None = None) -> None:
        time.sleep(5)
        print("UPLOADED", flush=True)


TRACKERS = {"device_tracker": DeviceTracker, "raise_with_slow_tracker": SlowTracker}


def say(what: str) -> None:
    """Print a line that reports to the test that the fault happens now."""
    print(f"FAULT {time.time():.3f} {what}", flush=True)


def ambient_zeros(run: StepRun, toy: Toy) -> None:
    """Call `jnp.zeros(())` under a global mesh in one process, which crashed the first attempt."""
    import jax
    import jax.numpy as jnp

    with jax.set_mesh(toy.mesh):
        jnp.zeros(())


def eager_op(run: StepRun, toy: Toy) -> None:
    """Run an eager operation on a global array in one process."""
    toy.array.sum()


def other_constant(run: StepRun, toy: Toy) -> None:
    """Compile a program with a different constant in process 0."""
    toy.update = toy.compile("update", 0.5 if run.processes.process_index else 0.125)


def raise_error(run: StepRun, toy: Toy) -> None:
    """Raise an error, as a bug or a lost device does."""
    raise FloatingPointError("a planted error")


def interrupt(run: StepRun, toy: Toy) -> None:
    """Raise KeyboardInterrupt, as a Ctrl-C that reaches only one host."""
    raise KeyboardInterrupt


def hang(run: StepRun, toy: Toy) -> None:
    """Hang without progress and without an error."""
    while True:
        time.sleep(1)


def kill(run: StepRun, toy: Toy) -> None:
    """Kill this process, as the kernel does with a process that uses too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(run: StepRun, toy: Toy) -> None:
    """Stop this process without ending it."""
    os.kill(os.getpid(), signal.SIGSTOP)


AT_ONCE = {
    "ambient_zeros": ambient_zeros,
    "eager_op": eager_op,
    "raise": raise_error,
    "raise_with_slow_tracker": raise_error,
    "interrupt": interrupt,
    "hang": hang,
    "kill": kill,
    "freeze": freeze,
}


def plant(flags: ToyFlags) -> Callable[..., Any]:
    """Return the function that each process calls where a fault may happen. It does something only in the victim."""

    def fault(run: StepRun, toy: Any, place: str) -> str | None:
        if run.name != flags.fault_step:
            return None
        at_update = place == "before an update" and toy.num_updates in (0, 3)
        if flags.fault == "other_constant" and at_update:
            say(flags.fault)
            other_constant(run, toy)  # every process compiles, with another constant in process 0
        if run.processes.process_index != flags.victim:
            return None
        if flags.fault in AT_ONCE and (at_update or place == "between rounds"):
            say(flags.fault)
            AT_ONCE[flags.fault](run, toy)
        if flags.fault == "skip" and at_update:
            say(flags.fault)
            return "skip"
        if flags.fault == "other_order" and place == "which update" and toy.num_updates == 3:
            say(flags.fault)
            return "other"
        return None

    return fault


def toy_steps(flags: ToyFlags) -> list[ExecutorStep]:
    """Return the steps: train-2 ==live==> infer (borrows) ==> train-5 (takes)."""
    fault = plant(flags)
    train_2 = ExecutorStep("train-2", train, ToyConfig(versioned(2), fault))
    generation = ExecutorStep("infer", infer, ToyConfig(versioned(2), fault, live=borrow(train_2)))
    train_5 = ExecutorStep("train-5", train, ToyConfig(versioned(7), fault, live=take(train_2)))
    return [train_2, generation, train_5]


if __name__ == "__main__":
    flags = parse_main_config(ToyFlags)
    open_tracker = TRACKERS.get(flags.fault, NoTracker)
    with joined_job(flags) as job:
        session = flags.job_session(open_tracker, job.group)
        executor_main(flags, steps=toy_steps(flags), session=session, processes=job.processes)
