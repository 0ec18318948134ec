"""Plan of a job on a topology: its programs, their work, and what else is in memory while they run.

The programs are built by the same functions as in the job, for device descriptions and abstract arrays. Quantities that
only the job knows (its data, the tokens of its prompts) are assumed to have their maximum, and the report lists them.
"""

import importlib.metadata
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from simpo_pipeline.data.prompts import load_prompts, num_bytes
from simpo_pipeline.data.rows import RowShape, max_padded_shape
from simpo_pipeline.distributed.mesh import DATA_AXIS, local_mesh, training_mesh
from simpo_pipeline.distributed.programs import LoweredProgram
from simpo_pipeline.errors import CapacityError, ConfigError
from simpo_pipeline.handoff.handoff import build_handoff
from simpo_pipeline.inference.config import EngineSizes
from simpo_pipeline.inference.engine_programs import EnginePrograms
from simpo_pipeline.inference.kv_cache import bytes_per_device
from simpo_pipeline.inference.sizing import Workload, size_engine
from simpo_pipeline.job.preflight_job import PreflightJob
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.ops.attention_tpu import kernel_supports
from simpo_pipeline.preflight.cache import ResultCache, default_folder
from simpo_pipeline.preflight.compiled import PlannedPrograms, compile_ahead
from simpo_pipeline.preflight.examine import PlannedLaunch, ProgramFigures, examine
from simpo_pipeline.preflight.memory import MemoryPhase, phase
from simpo_pipeline.preflight.report import Report
from simpo_pipeline.preflight.roofline import ProgramWork, generation_work, train_work
from simpo_pipeline.preflight.topology import Topology, devices_by_host
from simpo_pipeline.training.state import abstract_state
from simpo_pipeline.training.step import build_init_moments, build_train_step

_ROUND = re.compile(r"engine_(?:prefill_(\d+))?_?(?:decode_(\d+))?(?:_adjusted)?")
# Scopes whose conditionals are assumed to be true: rows are sampled, and chunks contain tokens.
_TAKEN = ("draw", "chunks")


def examine_job(job: PreflightJob, topology: Topology, devices: Sequence[Any]) -> Report:
    """Return the report on all programs of the job, from compiler results and arithmetic.

    Raises:
        ConfigError: The job's shapes are not known in advance.
    """
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")}
    cache = ResultCache(default_folder(), topology.name, versions["libtpu"])
    plan = Plan(job, topology, devices)
    # All hosts have the same arrangement of chips and the same programs, but their position in the slice determines the
    # routes of messages. The hosts at both ends represent those in between.
    ends = (None, *topology.end_hosts)
    examined = [
        examine(each, compile_ahead(each.lowered, cache) if each.host in ends else None, topology.chip)
        for each in plan.programs()
    ]
    return Report(topology, examined, plan.phases(examined), plan.assumptions, versions, plan.refusals)


class Plan:
    """Plan of a job on a topology."""

    def __init__(self, job: PreflightJob, topology: Topology, devices: Sequence[Any]) -> None:
        """Create a plan; `devices` are the devices of the topology.

        Raises:
            ConfigError: The job's shapes are not known in advance.
        """
        self._job, self._model, self._topology = job, _shape_of(job), topology
        self._hosts = devices_by_host(devices)
        self._mesh = training_mesh(devices=devices)
        self._state = abstract_state(self._model, job.trainer, self._mesh)
        self._itemsize = 2 if job.engine_dtype == "bfloat16" else 4
        self._requests = requests = _largest_workload(job, topology.num_hosts)
        # As in the job, where the trainer's state is in memory when the engine is sized.
        free = topology.chip.hbm_bytes - bytes_per_device(self._state)
        mesh = local_mesh(self._hosts[0])
        self._sizes: EngineSizes | None = None
        self.refusals: tuple[str, ...] = ()
        try:
            self._sizes = size_engine(job.engine, self._model, job.engine_dtype, requests, mesh, free)
        except CapacityError as error:
            self.refusals = (str(error),)
        # Mean number of tokens that a token attends to, if all generations reach `max_tokens`.
        self._context = requests.longest_prompt + job.sampling.max_tokens / 2
        self.assumptions = {
            "answers": f"fill all {job.trainer.train_seq_len} positions of each row except the first",
            "prompts": f"have one token per byte, {requests.longest_prompt} in the longest",
            "generations": f"reach max_tokens, so a token attends to {self._context:.0f} tokens on average",
            "engine": f"serves {requests.num_requests} requests per host with {self._sizes or 'the configured sizes'}",
        }

    def programs(self) -> Iterator[PlannedLaunch]:
        """Yield the lowered programs, without those of the engine if it does not fit."""
        yield from self._training_programs()
        if self._sizes is not None:
            for host in range(len(self._hosts)):
                yield from self._generation_programs(host, self._sizes)

    def phases(self, examined: Sequence[ProgramFigures]) -> list[MemoryPhase]:
        """Return the memory in use in each phase of the job; empty if a program did not compile."""
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

        training_phases = [
            # The program that initializes moments only needs shapes, so the parameters are not its arguments.
            phase("start", {"parameters": params}, running("init_moments"), code),
            phase("train", {}, running("train_step"), code),
            phase("hand over", {"moments of the trainer": state - params}, running("handoff"), code),
        ]
        if self._sizes is None:
            return training_phases
        return [
            *training_phases,
            phase("empty cache", {"trainer": state, "weights": weights}, running("engine_empty_cache"), code),
            # Weights and cache are arguments of each round. The program that copies pages needs little memory.
            phase("generate", {"trainer": state}, rounds, code),
        ]

    def _training_programs(self) -> Iterator[PlannedLaunch]:
        model, trainer, mesh = self._model, self._job.trainer, self._mesh
        shape = max_padded_shape(
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
        works = (ProgramWork(0, hbm_bytes=moments), self._train_work(shape), ProgramWork(0, hbm_bytes=moved))
        for lowered, work in zip(programs.lowered, works, strict=True):
            yield PlannedLaunch(lowered, work, host=None)

    def _train_work(self, shape: RowShape) -> ProgramWork:
        return train_work(
            self._model,
            num_rows=shape.num_rows,
            row_len=shape.row_len,
            num_predictions=shape.num_groups * shape.num_predictions,
            remat=self._job.trainer.remat,
            kernel=kernel_supports(shape.row_len, self._model.head_dim, None),
        )

    def _generation_programs(self, host: int, sizes: EngineSizes) -> Iterator[PlannedLaunch]:
        programs = PlannedPrograms()
        engine = EnginePrograms(self._model, sizes, local_mesh(self._hosts[host]), programs, self._job.engine_dtype)
        if self._requests.adjusts_logits:
            engine.compile_adjusted()
        for lowered in programs.lowered:
            turns = sizes.decode_steps_per_call if lowered.name.startswith("engine_decode") else 1
            yield PlannedLaunch(lowered, self._generation_work(lowered), host, turns)

    def _generation_work(self, lowered: LoweredProgram) -> ProgramWork:
        """Return the work of one iteration of the program: one token of each sequence, and its prefill chunk."""
        found = _ROUND.fullmatch(lowered.name)
        if found is None:
            return ProgramWork(0)
        chunk, rows = (int(group or 0) for group in found.groups())
        rows = min(rows, self._requests.num_requests)
        # Chunks contain whole prompts, which only attend to themselves and read nothing else from the cache.
        in_chunk = self._requests.longest_prompt / 2
        tokens = rows + chunk
        mean = (rows * self._context + chunk * in_chunk) / tokens
        read = int(rows * self._context + chunk)
        return generation_work(self._model, tokens, rows, read, mean, self._itemsize, scopes=_TAKEN)


def _shape_of(job: PreflightJob) -> LlamaConfig:
    if job.model is None:
        raise ConfigError("--preflight needs the model's shape before the model is fetched; set `llama` in the preset")
    if job.trainer.packing:
        raise ConfigError(
            "--preflight cannot predict the shape of packed rows, which depends on the data; check the same run with "
            "packing off"
        )
    return job.model


def _largest_workload(job: PreflightJob, num_hosts: int) -> Workload:
    """Return the workload of the host with the most prompts, if each has the maximum length of the longest prompt."""
    prompts = load_prompts(job.prompts)
    # A byte-level tokenizer produces at most one token per byte, and a beginning-of-sequence token.
    longest = max(num_bytes(prompt) + 1 for prompt in prompts)
    num_requests = math.ceil(len(prompts) / num_hosts) * job.sampling.n
    total = longest + job.sampling.max_tokens
    return Workload(num_requests, longest, total, num_requests * total, job.sampling.adjusts_logits)
