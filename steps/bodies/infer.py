"""The code of step `infer`."""

import collections
import dataclasses
import hashlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from simpo_pipeline.data.chat import EncodedPrompt, encode_prompt, load_tokenizer, stop_token_ids
from simpo_pipeline.data.prompts import ChatPrompt, Prompt, TokenPrompt, load_prompts, prompt_shard
from simpo_pipeline.data.records import Message
from simpo_pipeline.data.tokenizer import Tokenizer
from simpo_pipeline.distributed.mesh import global_mesh, local_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import CapacityError, ConfigError, CoordinationError, DataError
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.handoff.handoff import InferenceWeights, build_handoff
from simpo_pipeline.inference.config import EngineSizes
from simpo_pipeline.inference.engine import Engine, check_requests
from simpo_pipeline.inference.generated_rows import generated_row
from simpo_pipeline.inference.host_rows import HostRows
from simpo_pipeline.inference.row_files import merge_rows, merged_file, remove_rows
from simpo_pipeline.inference.sequence import Completion, Request
from simpo_pipeline.inference.sizing import Workload, available_memory_bytes, size_engine
from simpo_pipeline.inference.text import make_decoder, with_bad_words, with_end_tokens
from simpo_pipeline.job.session import session_of
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.infer import InferConfig

logger = logging.getLogger("simpo_pipeline.steps.infer")
# Number of rows sent to the tracker; the step's files contain all rows.
MAX_LOGGED_SAMPLES = 16
SECONDS_BETWEEN_PROGRESS_LINES = 5.0
# Counts of prompts that the model reads otherwise than they were written, by the note of their encoding. The names are
# those in the summary of `prepare_pairs`.
NOTES = {f"num_{note}": note for note in ("special_text", "omitted_text", "trimmed_text", "unencodable_text")}
# Counts that are summed over hosts.
COUNTS = ("prompt_tokens", "shared_tokens", "generated_tokens", "decoded_tokens", "num_preemptions", *NOTES)


def infer(config: InferConfig, run: StepRun) -> None:
    """Write one row per sample to this host's file, the merged file of all hosts, and `summary.json`.

    Each row is also written to `row_files.unfinished_file` as soon as its sample finishes, in case the step is killed.

    Raises:
        CapacityError: A prompt does not fit the engine. Raised before any device work.
        ConfigError: The trainer has finished another number of updates than `step`.
        DataError: The prompts cannot be read, or a host's rows are not those of its shard.
        CoordinationError: The hosts drew different tokens in mode `global_mesh`.
    """
    session, processes = session_of(run), run.processes
    _check_step(config)
    if processes.is_leader:
        remove_rows(run.output)
    prompts = load_prompts(config.prompts)
    shard = prompt_shard(len(prompts), processes.process_index, processes.process_count)
    tokenizer = load_tokenizer(config.model_path)
    rows = HostRows(run.output, processes, shard, _row_maker(config, processes, prompts, tokenizer))
    everywhere = config.mode == "global_mesh"
    served = [(index, prompts[index]) for index in (range(len(prompts)) if everywhere else shard)]
    completions, figures = _generate(config, session.programs, processes, tokenizer, served, rows)
    if everywhere:
        check_same_tokens(processes, completions)
    rows.write_in_order()
    # After this gather, every host's file is complete.
    figures_by_host = processes.gather(figures)
    if processes.is_leader:
        summary, samples = _merge(config, run.output, len(prompts), figures_by_host)
        run.output.write_json("summary.json", summary)
        shown = {f"infer/{name}": summary[name] for name in ("prompts", "generated_tokens", "tokens_per_second")}
        session.tracker.log(shown, step=config.step)
        session.tracker.summary(shown)
        session.tracker.log_samples(samples, step=config.step)


def _check_step(config: InferConfig) -> None:
    if config.trainer is not None and config.trainer.step != config.step:
        raise ConfigError(
            f"step is {config.step}, but the borrowed trainer has finished {config.trainer.step} updates. Rows and "
            "sampling keys contain the number of updates behind the parameters: set step to the last update of the "
            "training step that is borrowed from"
        )


def _row_maker(
    config: InferConfig, processes: Processes, prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> Callable[[Completion], dict[str, Any]]:
    origin = {
        "step": config.step,
        "process_index": processes.process_index,
        "process_count": processes.process_count,
    }
    decode = make_decoder(tokenizer)

    def make_row(completion: Completion) -> dict[str, Any]:
        prompt = prompts[completion.request.global_prompt_index]
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, ChatPrompt):
            text = tokenizer.decode(list(completion.request.prompt_tokens))
        return {**origin, **generated_row(completion, text, decode)}

    return make_row


def check_same_tokens(processes: Processes, completions: Sequence[Completion]) -> None:
    """Check that the engine over all hosts returned the same tokens to each of them.

    Raises:
        CoordinationError: The tokens differ. Every process raises it and names the first process that differs from
            process 0.
    """
    text = ";".join(",".join(map(str, completion.tokens)) for completion in completions)
    digests = processes.gather(hashlib.sha256(text.encode()).hexdigest())
    for index, digest in enumerate(digests):
        if digest != digests[0]:
            raise CoordinationError(
                f"the engine over all devices returned different tokens to process {index} than to process 0. Every "
                "host must serve the same requests with the same settings; if they do, a device computes wrong results"
            )


def _requests(
    config: InferConfig, tokenizer: Tokenizer, served: Sequence[tuple[int, Prompt]], vocab_size: int
) -> tuple[list[Request], dict[str, int]]:
    """Return one request per sample of the prompts, each of which comes with its index, and the counts of `NOTES`."""
    sampling = with_bad_words(config.sampling, tokenizer)
    sampling = with_end_tokens(sampling, stop_token_ids(tokenizer), vocab_size)
    encoded = {index: _encoded(config, tokenizer, index, prompt) for index, prompt in served}
    requests = [
        Request(prompt_tokens=prompt.tokens, global_prompt_index=index, sample_index=sample, sampling=sampling)
        for index, prompt in encoded.items()
        for sample in range(sampling.n)
    ]
    counts = {name: sum(note in prompt.notes for prompt in encoded.values()) for name, note in NOTES.items()}
    return requests, counts


def _encoded(config: InferConfig, tokenizer: Tokenizer, index: int, prompt: Prompt) -> EncodedPrompt:
    if isinstance(prompt, TokenPrompt):
        return EncodedPrompt(prompt.token_ids)
    if isinstance(prompt, ChatPrompt):
        text_or_messages = prompt.messages
    else:
        text_or_messages = [Message("user", prompt)] if config.chat else prompt
    try:
        return encode_prompt(tokenizer, text_or_messages, config.chat_config)
    except DataError as error:
        raise DataError(f"prompt {index}: {error}") from error


def _generate(
    config: InferConfig,
    programs: Programs,
    processes: Processes,
    tokenizer: Tokenizer,
    served: Sequence[tuple[int, Prompt]],
    rows: HostRows,
) -> tuple[list[Completion], dict[str, Any]]:
    """Return the completions in the order of the prompts, and statistics. `rows` gets each one as it finishes."""
    mesh = global_mesh() if config.mode == "global_mesh" else local_mesh()
    model = load_config(config.model_path) if config.trainer is None else config.trainer.model_config
    requests, notes = _requests(config, tokenizer, served, model.vocab_size)
    sizes = _sizes(config, processes, model, mesh, requests)
    check_requests(requests, sizes, model.vocab_size)
    # If a host cannot serve its shard, all hosts fail here, before any device is touched.
    processes.gather("every request can be served")
    engine = Engine(model, sizes, mesh, programs, config.compute_dtype, decode=make_decoder(tokenizer))
    processes.watch.check_peers()
    weights, cost = _weights(config, programs, model, mesh)
    log_progress = _log_progress()

    def on_progress(*progress: Any) -> None:
        log_progress(*progress)
        processes.watch.check_peers()

    try:
        with rows:
            completions, stats = engine.generate(
                weights.tree, requests, step=config.step, on_progress=on_progress, on_finished=rows.add
            )
    finally:
        weights.free()
    return completions, dataclasses.asdict(stats) | cost | notes | {"engine": dataclasses.asdict(sizes)}


def _sizes(
    config: InferConfig, processes: Processes, model: LlamaConfig, mesh: Mesh, requests: list[Request]
) -> EngineSizes:
    """Return the engine's sizes, equal on every host: for the maximum workload and the minimum memory over all hosts.

    Raises:
        CapacityError: The engine's sequences are longer than the model supports, or the engine does not fit in memory.
    """
    if (config.engine.max_seq_len or 0) > model.max_seq_len:
        raise CapacityError(
            f"engine.max_seq_len is {config.engine.max_seq_len}, but the model supports sequences of up to "
            f"{model.max_seq_len} tokens; lower engine.max_seq_len"
        )
    machine = socket.gethostname()
    memory_bytes = available_memory_bytes(mesh, processes.gather(machine).count(machine))
    hosts = processes.gather({"work": dataclasses.asdict(Workload.of(requests)), "memory_bytes": memory_bytes})
    work = Workload.merged([Workload(**host["work"]) for host in hosts])
    memory_bytes = min(host["memory_bytes"] for host in hosts)
    return size_engine(config.engine, model, config.compute_dtype, work, mesh, memory_bytes)


def _weights(
    config: InferConfig, programs: Programs, model: LlamaConfig, mesh: Mesh
) -> tuple[InferenceWeights, dict[str, float]]:
    """Return the engine's weights, handed off on device by a trainer or read from a folder, and the time it took."""
    wanted = with_shardings(abstract_llama(model, config.compute_dtype), mesh, TENSOR_PARALLEL_RULES)
    if config.trainer is None:
        started = time.perf_counter()
        tree = jax.block_until_ready(load_weights(config.model_path, wanted))
        weights = InferenceWeights(tree=tree, shared=False, num_bytes=0)
        return weights, {"load_seconds": time.perf_counter() - started}
    # Compiled before the timer starts: a schedule with many generations compiles it once.
    handoff = build_handoff(programs, config.trainer.abstract_params, wanted)
    started = time.perf_counter()
    weights = handoff(config.trainer.params)
    jax.block_until_ready(weights.tree)
    bytes_copied = 0 if weights.shared else weights.num_bytes
    return weights, {"handoff_seconds": time.perf_counter() - started, "handoff_bytes_copied": bytes_copied}


def _log_progress():
    """Return a callback that logs the progress of generation every few seconds and at the end."""
    last_line = time.perf_counter()

    def log(num_generated: int, num_finished: int, num_requests: int, seconds: float) -> None:
        nonlocal last_line
        now = time.perf_counter()
        if num_finished == num_requests or now - last_line >= SECONDS_BETWEEN_PROGRESS_LINES:
            last_line = now
            rate = num_generated / seconds if seconds else 0.0
            logger.info("generated %d tokens, %d/%d done, %.0f tok/s", num_generated, num_finished, num_requests, rate)

    return log


def _merge(
    config: InferConfig, output: OutputFolder, num_prompts: int, figures: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the rows of all hosts in prompt order and return the job's summary and the first rows; leader only."""
    reasons: collections.Counter[str] = collections.Counter()
    samples: list[dict[str, Any]] = []

    with output.open_rows(merged_file(len(figures))) as file:
        for row in merge_rows(output.path, num_prompts, config.sampling.n, len(figures)):
            reasons[row["finish_reason"]] += 1
            if len(samples) < MAX_LOGGED_SAMPLES:
                samples.append(row)
            file.write(row)
    # One engine over all hosts served every request, so each host counted all of them.
    counting = figures[:1] if config.mode == "global_mesh" else figures
    totals = {name: sum(host[name] for host in counting) for name in COUNTS}
    # Hosts generate in parallel, so the times of the slowest host are those of the job.
    slowest = {name: max(host[name] for host in figures) for name in figures[0] if name not in (*COUNTS, "engine")}
    seconds = slowest["prefill_seconds"] + slowest["decode_seconds"]
    tokens_per_second = totals["generated_tokens"] / seconds if seconds else 0.0
    summary = {
        "step": config.step,
        "prompts": num_prompts,
        "rows": reasons.total(),
        "finish_reasons": dict(sorted(reasons.items())),
        **totals,
        **{name: round(value, 6) for name, value in slowest.items()},
        "tokens": totals["generated_tokens"],
        "tokens_per_second": round(tokens_per_second, 1),
        "chat_config": dataclasses.asdict(config.chat_config),
        "engine": figures[0]["engine"],
    }
    return summary, samples
