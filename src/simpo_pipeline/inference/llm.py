"""Text generation from one model on the devices of this process; names as in vLLM."""

import dataclasses
import logging
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

from simpo_pipeline.data.chat import EncodedPrompt, encode_prompt, load_tokenizer, stop_token_ids
from simpo_pipeline.data.config import DEFAULT_CHAT, ChatConfig
from simpo_pipeline.data.messages import Message, parse_messages
from simpo_pipeline.distributed.mesh import local_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import ConfigError, DataError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.generated_rows import RowStream, generated_row
from simpo_pipeline.inference.model_folder import model_folder
from simpo_pipeline.inference.outputs import RequestOutput, request_outputs
from simpo_pipeline.inference.sequence import Completion, Request
from simpo_pipeline.inference.sizing import Workload, available_memory_bytes, size_engine
from simpo_pipeline.inference.text import make_decoder, with_bad_words, with_end_tokens
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.storage.jsonl import JsonlWriter

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")
# Default of `max_seqs`; the same as vLLM's.
_MAX_SEQS = 256
# Default memory utilization. An accelerator serves the engine alone. Host memory is shared, and each call fills the
# cache there with zeros.
_MEMORY_SHARE, _CPU_MEMORY_SHARE = 0.9, 0.25

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class _Prompt(NamedTuple):
    text: str | None
    encoded: EncodedPrompt

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.encoded.tokens


class LLM:
    """A model, its tokenizer, and an engine whose programs are compiled at construction.

    The tokens generated for a prompt depend on the weights, the prompt, its index among the prompts, and its sampling
    parameters (including `seed`). They do not depend on the engine's sizes or on the other prompts.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_seqs: int | None = None,
        max_seq_len: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        memory_utilization: float | None = None,
        chat_config: ChatConfig = DEFAULT_CHAT,
    ) -> None:
        """Load a model in Hugging Face format.

        Args:
            model: A folder at any storage path, with config.json, safetensors and tokenizer.json; or a model of the hub
                (`owner/name`, `owner/name@revision`), which is downloaded to the hub's cache. Only `chat` needs a chat
                template.
            dtype: Data type of the weights and the cache. On a CPU, bfloat16 is faster only if the CPU has bfloat16
                matmul instructions (AMX, AVX512-BF16).
            max_seqs: See `EngineConfig`; None: 256.
            max_seq_len: See `EngineConfig`; None: the model's number of positions.
            page_size: See `EngineConfig`; None: the default for the devices.
            num_pages: See `EngineConfig`; None: as many as memory allows.
            memory_utilization: Fraction of the free memory that weights, cache and programs may use; None: 0.9 on
                accelerators, 0.25 on CPUs.
            chat_config: How texts and conversations become tokens.

        Raises:
            ConfigError: A size is invalid.
            CapacityError: The model or the cache does not fit in memory.
            DataError, ModelError, StorageError: The model cannot be found or read, or has invalid contents.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        mesh = local_mesh()
        if memory_utilization is None:
            memory_utilization = _CPU_MEMORY_SHARE if mesh.devices.flat[0].platform == "cpu" else _MEMORY_SHARE
        config = EngineConfig(max_seqs, max_seq_len, page_size, num_pages, memory_utilization=memory_utilization)
        if not isinstance(model, str | os.PathLike):
            raise ConfigError(f"model is {model!r:.80}; pass a folder, or the id of a model on the hub")
        folder = model_folder(os.fspath(model))
        model_config = load_config(folder)
        self._tokenizer, self._chat_config = load_tokenizer(folder), chat_config
        self._decode = make_decoder(self._tokenizer)
        self._end_tokens = stop_token_ids(self._tokenizer)
        work = _max_work(config, model_config)
        sizes = size_engine(config, model_config, dtype, work, mesh, available_memory_bytes(mesh))
        self._engine = Engine(model_config, sizes, mesh, Programs(), dtype, decode=self._decode)
        shapes = with_shardings(abstract_llama(model_config, dtype), mesh, TENSOR_PARALLEL_RULES)
        self._weights = self._engine.lay_out(load_weights(folder, shapes))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        output_path: str | None = None,
    ) -> list[RequestOutput]:
        """Generate continuations of each prompt; outputs are in the order of the prompts.

        Args:
            prompts: A text, or a list of texts or lists of token ids. A text is encoded as it is, with the token that
                the tokenizer puts before each text (BOS), if any. The chat template is not applied.
            sampling_params: One for all prompts, or one per prompt; None: `SamplingParams()`. Unless `ignore_eos` is
                set, the tokenizer's end-of-sequence and end-of-turn tokens also end a sample. If a seed is None, one
                seed is drawn per call; it is logged, and the outputs and rows have it.
            output_path: A file at any storage path for one row per sample (`generated_rows`). Each row is written as
                soon as its sample finishes. An existing file is replaced. `read_finished_rows` can read the file while
                it grows.

        Raises:
            ConfigError, CapacityError: A prompt or its sampling parameters cannot be served; raised before any device
                work.
            StorageError: A row could not be written.
        """
        encoded = [self._encode(prompt, at) for at, prompt in _listed(prompts)]
        self._warn_of_doubled_first_tokens(encoded)
        return self._serve(encoded, sampling_params, output_path)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        output_path: str | None = None,
    ) -> list[RequestOutput]:
        """Generate an answer to each conversation: apply the chat template, then generate as `generate` does.

        Args:
            messages: A conversation (a list of `{"role": ..., "content": ...}`), or a list of conversations.
            sampling_params: As in `generate`.
            output_path: As in `generate`.

        Raises:
            DataError: The tokenizer has no chat template, or the template rejects a conversation.
            ConfigError, CapacityError, StorageError: As in `generate`.
        """
        if not isinstance(messages, Sequence):
            raise ConfigError(f"messages is {messages!r:.80}; pass a conversation (a list of turns), or a list of them")
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_single else messages
        prompts = []
        for at, conversation in enumerate(conversations):
            encoded = self._encoded(_turns(conversation, at), f"messages[{at}]")
            prompts.append(_Prompt(self._tokenizer.decode(encoded.tokens), encoded))
        return self._serve(prompts, sampling_params, output_path)

    def _serve(self, prompts: Sequence[_Prompt], sampling_params: Any, output_path: str | None) -> list[RequestOutput]:
        _log_notes([prompt.encoded for prompt in prompts])
        texts = [prompt.text for prompt in prompts]
        given = _one_per_prompt(sampling_params, len(prompts))
        resolved = self._resolved(given)
        samplings = [resolved[each] for each in given]
        requests = [
            Request(prompt.tokens, index, sample, sampling)
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
            for sample in range(sampling.n)
        ]
        self._engine.check(requests)  # before the file is opened, which replaces an earlier one
        with nullcontext() if output_path is None else RowStream(JsonlWriter(output_path)) as stream:

            def row(completion: Completion) -> dict[str, Any]:
                request = completion.request
                drawn = {"seed": request.sampling.seed} if given[request.global_prompt_index].seed is None else {}
                return {**generated_row(completion, texts[request.global_prompt_index], self._decode), **drawn}

            def write(finished: list[Completion]) -> None:
                if stream is not None:
                    stream.write(list(map(row, finished)))

            completions, _ = self._engine.generate(self._weights, requests, step=0, on_finished=write)
        return request_outputs(texts, completions, self._decode)

    def _encode(self, prompt: Any, at: int) -> _Prompt:
        if isinstance(prompt, str):
            return _Prompt(prompt, self._encoded(prompt, f"prompts[{at}]"))
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)
        if not is_list or not all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            raise ConfigError(
                f"prompts[{at}] is {prompt!r:.80}; a prompt must be a text or a list of token ids, which are integers"
            )
        return _Prompt(None, EncodedPrompt(tuple(prompt)))

    def _encoded(self, prompt: str | Sequence[Message], name: str) -> EncodedPrompt:
        try:
            return encode_prompt(self._tokenizer, prompt, self._chat_config)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _warn_of_doubled_first_tokens(self, prompts: Sequence[_Prompt]) -> None:
        first = tuple(self._tokenizer.encode(""))
        length = len(first)
        doubled = [
            at
            for at, prompt in enumerate(prompts)
            if first and prompt.text is not None and prompt.tokens[length : 2 * length] == first
        ]
        if doubled:
            logger.warning(
                "%d of %d prompts, the first of them prompts[%d], begin with %r, and the tokenizer puts it before each "
                "text, so the model reads it twice; remove it from the texts, or pass token ids",
                *(len(doubled), len(prompts), doubled[0], self._tokenizer.decode(first)),
            )

    def _resolved(self, given: Sequence[SamplingParams]) -> dict[SamplingParams, SamplingParams]:
        """Return the parameters of requests, with a seed and only token ids, by those that were given."""
        seed = secrets.randbits(32)
        if any(each.seed is None for each in given):
            logger.info("the sampling parameters have no seed; this call uses seed %d, which repeats it", seed)
        vocab_size = self._engine.model_config.vocab_size
        resolved: dict[SamplingParams, SamplingParams] = {}
        for each in dict.fromkeys(given):
            seeded = dataclasses.replace(each, seed=seed) if each.seed is None else each
            resolved[each] = with_end_tokens(with_bad_words(seeded, self._tokenizer), self._end_tokens, vocab_size)
        return resolved


def _max_work(config: EngineConfig, model: LlamaConfig) -> Workload:
    """Return the largest workload that the engine may get, because the requests are not known yet."""
    num_seqs, length = config.max_seqs or _MAX_SEQS, config.max_seq_len or model.max_seq_len
    return Workload(num_seqs, length, length, total_tokens=num_seqs * length, adjusts_logits=True)


def _one_per_prompt(sampling_params: Any, num_prompts: int) -> Sequence[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    is_list = isinstance(sampling_params, list | tuple)
    if not is_list or not all(isinstance(each, SamplingParams) for each in sampling_params):
        raise ConfigError(
            f"sampling_params is {sampling_params!r:.80}; pass SamplingParams, or a list with one per prompt"
        )
    if len(sampling_params) != num_prompts:
        raise ConfigError(
            f"{len(sampling_params)} sampling_params for {num_prompts} prompts; pass one, or one per prompt"
        )
    return sampling_params


def _listed(prompts: Any) -> list[tuple[int, Any]]:
    if isinstance(prompts, str):
        return [(0, prompts)]
    if not isinstance(prompts, Sequence):
        raise ConfigError(f"prompts is a {type(prompts).__name__}; pass a text, or a list of texts or token id lists")
    if any(isinstance(prompt, int) for prompt in prompts):
        raise ConfigError("prompts is a list with integers; pass [[...]] for one prompt of token ids")
    return list(enumerate(prompts))


def _log_notes(prompts: Sequence[EncodedPrompt]) -> None:
    """Report how many prompts the model reads otherwise than they were written, which `ChatConfig` allowed."""
    for note, count in Counter(note for prompt in prompts for note in sorted(prompt.notes)).items():
        logger.warning("%d of %d prompts have %s", count, len(prompts), note.replace("_", " "))


def _turns(conversation: Any, at: int) -> list[Message]:
    expected = f"messages[{at}] is {conversation!r:.120}; a conversation must be a list of turns with role and content"
    if not isinstance(conversation, Sequence) or not conversation:
        raise ConfigError(expected)
    try:
        return list(parse_messages(list(conversation), f"messages[{at}]", "LLM.chat"))
    except DataError as error:
        raise ConfigError(f"{expected} ({error})") from error
