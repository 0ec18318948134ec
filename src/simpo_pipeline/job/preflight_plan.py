"""Which programs a job launches on a topology, what each has to do, and what lives beside it while it runs.

The programs are built by the functions that the job builds them with, for descriptions of devices and abstract arrays.
What only the job knows (its data, its prompts' tokens) is assumed at its largest, and said in the report.
"""

import importlib.metadata
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from simpo_pipeline.data.prompts import load_prompts
from simpo_pipeline.data.rows import RowShape, widest_shape
from simpo_pipeline.distributed.mesh import DATA_AXIS, local_mesh, training_mesh
from simpo_pipeline.distributed.programs import LoweredProgram
from simpo_pipeline.errors import CapacityError, ConfigError
from simpo_pipeline.handoff.handoff import build_handoff
from simpo_pipeline.inference.config import EngineSizes
from simpo_pipeline.inference.engine_programs import EnginePrograms
from simpo_pipeline.inference.kv_cache import bytes_per_device
from simpo_pipeline.inference.sizing import Work as EngineWork
from simpo_pipeline.inference.sizing import size_engine
from simpo_pipeline.job.preflight_job import PreflightJob
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.ops.attention_tpu import kernel_takes
from simpo_pipeline.preflight.cache import ResultCache, default_folder
from simpo_pipeline.preflight.compiled import PlannedPrograms, compile_ahead
from simpo_pipeline.preflight.examine import Examined, Planned, examine
from simpo_pipeline.preflight.memory import Phase, phase
from simpo_pipeline.preflight.report import Report
from simpo_pipeline.preflight.roofline import Work, generation_work, train_work
from simpo_pipeline.preflight.topology import Topology, devices_by_host
from simpo_pipeline.training.state import abstract_state
from simpo_pipeline.training.step import build_init_moments, build_train_step

_ROUND = re.compile(r"engine_(?:prefill_(\d+))?_?(?:decode_(\d+))?")
# Conditionals that a job takes for true: its rows draw at random, and its chunks hold tokens.
_TAKEN = ("draw", "chunks")


def examine_job(job: PreflightJob, topology: Topology, devices: Sequence[Any]) -> Report:
    """What the compiler and arithmetic say of every program of the job.

    Raises:
        ConfigError: the job's shapes are not known ahead.
    """
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")}
    cache = ResultCache(default_folder(), topology.name, versions["libtpu"])
    plan = Plan(job, topology, devices)
    # Hosts' chips lie alike and their programs are the same; where in the slice they lie changes the ways that messages
    # take. Both ends of it stand for the hosts between.
    ends = (None, *topology.end_hosts)
    examined = [
        examine(each, compile_ahead(each.lowered, cache) if each.host in ends else None, topology.chip)
        for each in plan.programs()
    ]
    return Report(topology, examined, plan.phases(examined), plan.assumptions, versions, plan.refusals)


class Plan:
    """A job on a topology."""

    def __init__(self, job: PreflightJob, topology: Topology, devices: Sequence[Any]) -> None:
        """`devices` describe the topology.

        Raises: ConfigError if the job's shapes are not known ahead.
        """
        self._job, self._model, self._topology = job, _shape_of(job), topology
        self._hosts = devices_by_host(devices)
        self._mesh = training_mesh(devices=devices)
        self._state = abstract_state(self._model, job.trainer, self._mesh)
        self._itemsize = 2 if job.engine_dtype == "bfloat16" else 4
        self._requests = requests = _largest_work(job, topology.num_hosts)
        # As in the job, whose trainer holds its state when the engine is sized.
        free = topology.chip.hbm_bytes - bytes_per_device(self._state)
        mesh = local_mesh(self._hosts[0])
        self._sizes: EngineSizes | None = None
        self.refusals: tuple[str, ...] = ()
        try:
            self._sizes = size_engine(job.engine, self._model, job.engine_dtype, requests, mesh, free)
        except CapacityError as error:
            self.refusals = (str(error),)
        # Tokens that one token attends to on average, in a generation that runs to its end.
        self._context = requests.longest_prompt + job.sampling.max_tokens / 2
        self.assumptions = {
            "answers": f"fill all {job.trainer.train_seq_len} places of each row but the first",
            "prompts": f"have a token for each byte, {requests.longest_prompt} in the longest",
            "generations": f"run to their end, so the mean token attends to {self._context:.0f}",
            "engine": f"serves {requests.num_requests} requests on each host with {self._sizes or 'what it asks for'}",
        }

    def programs(self) -> Iterator[Planned]:
        """Lowers each program; none of an engine that is refused."""
        yield from self._of_training()
        if self._sizes is not None:
            for host in range(len(self._hosts)):
                yield from self._of_generation(host, self._sizes)

    def phases(self, examined: Sequence[Examined]) -> list[Phase]:
        """What is live in each phase of the job; nothing is known if a program did not compile."""
        memory = {each.name: each.memory for each in examined if each.memory is not None}
        if len(memory) < len({each.name for each in examined}):
            return []
        state = bytes_per_device(self._state)
        params = bytes_per_device(self._state.params)
        rounds = {name: needs for name, needs in memory.items() if "decode" in name or "prefill" in name}
        code = sum(needs.code for needs in memory.values())
        weights = memory["handoff"].outputs

        def running(*names: str) -> dict[str, Any]:
            return {name: memory[name] for name in names}

        of_training = [
            # Moments depend on the parameters' shapes alone, so these are no arguments of the program.
            phase("start", {"parameters": params}, running("init_moments"), code),
            phase("train", {}, running("train_step"), code),
            phase("hand over", {"moments of the trainer": state - params}, running("handoff"), code),
        ]
        if self._sizes is None:
            return of_training
        return [
            *of_training,
            phase("empty cache", {"trainer": state, "weights": weights}, running("engine_empty_cache"), code),
            # Weights and cache are arguments of each round; the program that copies pages needs next to nothing.
            phase("generate", {"trainer": state}, rounds, code),
        ]

    def _of_training(self) -> Iterator[Planned]:
        model, trainer, mesh = self._model, self._job.trainer, self._mesh
        shape = widest_shape(
            trainer.train_batch_size, trainer.train_seq_len, trainer.grad_accumulation * mesh.shape[DATA_AXIS]
        )
        wanted = with_shardings(
            abstract_llama(model, self._job.engine_dtype), local_mesh(self._hosts[0]), TENSOR_PARALLEL_RULES
        )
        programs = PlannedPrograms()
        build_init_moments(programs, model, trainer, mesh)
        build_train_step(programs, model, trainer, mesh, shape)
        build_handoff(programs, self._state.params, wanted)
        moments = model.num_parameters * 8
        moved = model.num_parameters * (4 + self._itemsize * len(self._hosts))
        works = (Work(0, hbm_bytes=moments), self._train_work(shape), Work(0, hbm_bytes=moved))
        for lowered, work in zip(programs.lowered, works, strict=True):
            yield Planned(lowered, work, host=None)

    def _train_work(self, shape: RowShape) -> Work:
        return train_work(
            self._model,
            num_rows=shape.num_rows,
            row_len=shape.row_len,
            num_predictions=shape.num_groups * shape.num_predictions,
            remat=self._job.trainer.remat,
            kernel=kernel_takes(shape.row_len, self._model.head_dim, None),
        )

    def _of_generation(self, host: int, sizes: EngineSizes) -> Iterator[Planned]:
        programs = PlannedPrograms()
        EnginePrograms(self._model, sizes, local_mesh(self._hosts[host]), programs, self._job.engine_dtype)
        for lowered in programs.lowered:
            turns = sizes.decode_steps_per_call if lowered.name.startswith("engine_decode") else 1
            yield Planned(lowered, self._generation_work(lowered), host, turns)

    def _generation_work(self, lowered: LoweredProgram) -> Work:
        """Of one turn of the program: a token of each sequence that it can have, and the chunks that it is for."""
        found = _ROUND.fullmatch(lowered.name)
        if found is None:
            return Work(0)
        chunk, rows = (int(group or 0) for group in found.groups())
        rows = min(rows, self._requests.num_requests)
        # Chunks hold whole prompts, which attend to themselves and read back nothing else.
        in_chunk = self._requests.longest_prompt / 2
        tokens = rows + chunk
        mean = (rows * self._context + chunk * in_chunk) / tokens
        read = int(rows * self._context + chunk)
        return generation_work(self._model, tokens, rows, read, mean, self._itemsize, scopes=_TAKEN)


def _shape_of(job: PreflightJob) -> LlamaConfig:
    if job.model is None:
        raise ConfigError("--preflight needs the model's shape before the model is there; give the preset its `llama`")
    if job.trainer.packing:
        raise ConfigError(
            "--preflight cannot know the shape of packed rows, which depends on the data; check the same run with "
            "packing off"
        )
    return job.model


def _largest_work(job: PreflightJob, num_hosts: int) -> EngineWork:
    """The work of the host with the most prompts, each of them as long as the longest may be."""
    prompts = load_prompts(job.prompts)
    # A tokenizer that works on bytes makes at most one token of each, and one to begin with.
    longest = max(len(prompt.encode()) + 1 for prompt in prompts)
    num_requests = math.ceil(len(prompts) / num_hosts) * job.sampling.n
    total = longest + job.sampling.max_tokens
    return EngineWork(num_requests, longest, total, num_requests * total)
