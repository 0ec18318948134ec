"""Faults that the tests must detect: each fault is put into a copy of the code, and one test file must fail.

    uv run python tests/mutants.py                              # all of them; about an hour on two cores
    uv run python tests/mutants.py --only gamma-with-the-other-sign page-freed-twice
    uv run python tests/mutants.py --check                      # only whether every fault still applies
    uv run python tests/mutants.py --write docs/mutants.md      # all of them, and a table of what caught them

A fault that survives shows code that no test checks. The exit code is 0 if all faults were caught, 1 if one was not,
and 2 if a test file fails without any fault, because "caught" would then mean nothing.

The checkout itself is never changed. `tests/test_mutants.py` keeps this table in step with the code.
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "src/simpo_pipeline"
ROOMS = (
    *("executor", "storage", "tracking", "distributed", "data", "config_files", "model", "ops", "training"),
    *("inference", "handoff", "preflight", "job", "steps", "experiments", "infra/launcher"),
)
TIMEOUT_SECONDS = 600.0
# Excludes the parameters of a test, which may contain any text.
_FIRST_FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s\[]+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault, made by replacing `before` with `after`.

    Attributes:
        name: Description of the fault.
        file: Path relative to the root of the repository.
        before: Text that occurs exactly once in the file.
        after: Text of the fault.
        caught_by: The test file that must fail.
    """

    name: str
    file: str
    before: str
    after: str
    caught_by: str

    @property
    def room(self) -> str:
        """Room whose code is changed."""
        parts = pathlib.PurePosixPath(self.file).parts
        if self.file.startswith(f"{PACKAGE}/"):
            return parts[2]
        return "/".join(parts[:2]) if parts[0] == "infra" else parts[0]


EXECUTOR = (
    Mutant(
        "lease-expiry-compared-the-wrong-way",
        "src/simpo_pipeline/executor/records/lease.py",
        "return now - known[1] < self._config.expiry_seconds",
        "return now - known[1] > self._config.expiry_seconds",
        "tests/executor/test_lease.py",
    ),
    Mutant(
        "old-heartbeat-believed",
        "src/simpo_pipeline/executor/records/lease.py",
        "if lease.lost or _now() - lease.renewed >= self._config.expiry_seconds:",
        "if lease.lost:",
        "tests/executor/test_lease.py",
    ),
    Mutant(
        "lease-taken-over-whatever-was-seen",
        "src/simpo_pipeline/executor/records/lease.py",
        "if not ours and self._watch.is_fresh(path, theirs):",
        "if not ours and not self._watch.is_fresh(path, theirs):",
        "tests/executor/test_lease.py",
    ),
    Mutant(
        "dependency-left-out-of-identity",
        "src/simpo_pipeline/executor/planning/identity.py",
        'label = f"{edge.step.name}-{identities[edge.step].hash}"',
        "label = edge.step.name",
        "tests/executor/test_identity.py",
    ),
    Mutant(
        "use-of-a-dependency-left-out-of-identity",
        "src/simpo_pipeline/executor/planning/identity.py",
        '"use": edge.kind.value, ',
        "",
        "tests/executor/test_identity.py",
    ),
    Mutant(
        "file-from-outside-identified-by-its-path",
        "src/simpo_pipeline/executor/planning/identity.py",
        "    if path in contents:\n        return",
        "    if path in ():\n        return",
        "tests/executor/test_outside_files.py",
    ),
    Mutant(
        "cached-checksum-of-a-file-changed-in-place",
        "src/simpo_pipeline/storage/content.py",
        "found.st_mtime_ns, found.st_ctime_ns, found.st_dev",
        "found.st_mtime_ns, found.st_mtime_ns, found.st_dev",
        "tests/executor/test_outside_files.py",
    ),
    Mutant(
        "success-written-before-the-manifest",
        "src/simpo_pipeline/executor/running/attempt.py",
        "self._files.put_manifest()",
        "self._files.put_status(Status.SUCCESS); self._files.put_manifest()",
        "tests/executor/test_kill.py",
    ),
    Mutant(
        "success-without-manifest-believed",
        "src/simpo_pipeline/executor/records/status.py",
        "return self.status is Status.SUCCESS and self.manifest_problem is None",
        "return self.status is Status.SUCCESS",
        "tests/executor/test_status.py",
    ),
    Mutant(
        "size-of-an-output-not-compared",
        "src/simpo_pipeline/executor/records/status.py",
        "if other.num_bytes != entry.num_bytes:",
        "if other.num_bytes < 0:",
        "tests/executor/test_status.py",
    ),
    Mutant(
        "replay-digest-not-compared",
        "src/simpo_pipeline/executor/running/attempt.py",
        "elif recorded != digest:",
        "elif digest is None:",
        "tests/executor/test_executor.py",
    ),
    Mutant(
        "refused-write-that-is-swallowed-counts-as-success",
        "src/simpo_pipeline/executor/running/stopping.py",
        "            self.stop(error)\n",
        "",
        "tests/executor/test_two_jobs.py",
    ),
    Mutant(
        "stopped-step-never-ends-its-process",
        "src/simpo_pipeline/executor/running/stopping.py",
        "os._exit(STOPPED_EXIT_CODE)",
        "pass",
        "tests/executor/test_stopping.py",
    ),
    Mutant(
        "dependents-of-a-failed-step-run",
        "src/simpo_pipeline/executor/running/schedule.py",
        "in (Ending.FAILED, Ending.DEP_FAILED)",
        "in (Ending.DEP_FAILED,)",
        "tests/executor/test_executor.py",
    ),
    Mutant(
        "chain-of-live-values-replayed-from-its-middle",
        "src/simpo_pipeline/executor/planning/plan.py",
        "decisions[consumer].action in (Action.RUN, Action.REPLAY)",
        "decisions[consumer].action in (Action.RUN,)",
        "tests/executor/test_plan.py",
    ),
    Mutant(
        "live-value-freed-at-its-first-borrowers-end",
        "src/simpo_pipeline/executor/running/live.py",
        "self._held[producer].waiting.discard(consumer)",
        "self._held[producer].waiting.clear()",
        "tests/executor/test_live.py",
    ),
    Mutant(
        "live-value-taken-from-under-a-borrower",
        "src/simpo_pipeline/executor/running/live.py",
        "others = held.waiting - {consumer}",
        "others = held.waiting - held.waiting",
        "tests/executor/test_live.py",
    ),
    Mutant(
        "two-takers-allowed",
        "src/simpo_pipeline/executor/planning/order.py",
        "if producer in takers:",
        "if producer in ():",
        "tests/executor/test_order.py",
    ),
    Mutant(
        "taker-does-not-wait-for-borrowers",
        "src/simpo_pipeline/executor/planning/order.py",
        "implied.setdefault(taker, []).extend(borrowers.get(producer, ()))",
        "implied.setdefault(taker, [])",
        "tests/executor/test_order.py",
    ),
    Mutant(
        "secret-in-a-record",
        "src/simpo_pipeline/executor/records/secrets.py",
        "shown.append(REDACTED)",
        "shown.append(word)",
        "tests/executor/test_secrets.py",
    ),
    Mutant(
        "young-files-collected",
        "src/simpo_pipeline/executor/commands/litter.py",
        "return all(is_quiet(entry.modified, now) for entry in files)",
        "return any(is_quiet(entry.modified, now) for entry in files)",
        "tests/executor/test_litter.py",
    ),
)

STORAGE = (
    Mutant(
        "fence-ignored",
        "src/simpo_pipeline/storage/output_folder.py",
        'files.write_bytes(self._path_to_write(name), text.encode("utf-8"), self._fence)',
        'files.write_bytes(self._path_to_write(name), text.encode("utf-8"))',
        "tests/storage/test_fence.py",
    ),
    Mutant(
        "fence-not-asked-when-the-file-appears",
        "src/simpo_pipeline/storage/files.py",
        "store_of(path).write_bytes(path, data, fence.hold())",
        "store_of(path).write_bytes(path, data, OPEN.hold())",
        "tests/storage/test_fence.py",
    ),
    Mutant(
        "write-not-atomic",
        "src/simpo_pipeline/storage/local_store.py",
        "os.replace(file.name, target)",
        "shutil.copyfile(file.name, target)",
        "tests/storage/test_files.py",
    ),
    Mutant(
        "half-a-file-left-by-a-write-that-raised",
        "src/simpo_pipeline/storage/local_versions.py",
        "Path(temporary).unlink(missing_ok=True)",
        "pass",
        "tests/storage/test_files.py",
    ),
    Mutant(
        "gcs-precondition-dropped",
        "src/simpo_pipeline/storage/gcs_store.py",
        "                ifGenerationMatch=expected or _ABSENT,\n",
        "",
        "tests/storage/test_conditional.py",
    ),
    Mutant(
        "another-jobs-write-taken-for-ours",
        "src/simpo_pipeline/storage/gcs_store.py",
        ".get(_WRITE_ID) == write_id else None",
        ".get(_WRITE_ID) else None",
        "tests/storage/test_conditional.py",
    ),
    Mutant(
        "only-the-first-page-of-a-listing",
        "src/simpo_pipeline/storage/gcs_store.py",
        'token = page.get("nextPageToken")',
        "token = None",
        "tests/storage/test_gcs.py",
    ),
    Mutant(
        "local-version-not-compared",
        "src/simpo_pipeline/storage/local_versions.py",
        "            if current != expected:",
        "            if current is None:",
        "tests/storage/test_conditional.py",
    ),
    Mutant(
        "checksum-of-the-last-piece-only",
        "src/simpo_pipeline/storage/checksum.py",
        "checksum = extend(checksum, chunk)",
        "checksum = extend(0, chunk)",
        "tests/storage/test_checksum.py",
    ),
    Mutant(
        "rows-kept-in-a-buffer",
        "src/simpo_pipeline/storage/jsonl.py",
        "self._file.flush()",
        "pass",
        "tests/storage/test_jsonl.py",
    ),
    Mutant(
        "bare-nan-written",
        "src/simpo_pipeline/storage/json_text.py",
        "ensure_ascii=False, allow_nan=False",
        "ensure_ascii=False",
        "tests/storage/test_json_text.py",
    ),
)

TRACKING = (
    Mutant(
        "array-accepted-as-a-metric",
        "src/simpo_pipeline/tracking/tracker.py",
        "if isinstance(value, bool) or not isinstance(value, int | float):",
        "if isinstance(value, bool):",
        "tests/tracking/test_trackers.py",
    ),
    Mutant(
        "failed-job-tracked-as-finished",
        "src/simpo_pipeline/tracking/jsonl.py",
        "        if error is None:",
        "        if True:",
        "tests/tracking/test_trackers.py",
    ),
    Mutant(
        "every-metric-over-its-own-axis",
        "src/simpo_pipeline/tracking/wandb.py",
        "axes = {self._axis_of(name): step for name in metrics}",
        "axes = {self._axis_of(name): 0 for name in metrics}",
        "tests/tracking/test_trackers.py",
    ),
)

DISTRIBUTED = (
    Mutant(
        "ledger-records-no-launch-over-processes",
        "src/simpo_pipeline/distributed/ledger.py",
        "if launch.num_processes > 1:",
        "if launch.num_processes < 1:",
        "tests/distributed/test_ledger.py",
    ),
    Mutant(
        "ledgers-of-other-lengths-called-equal",
        "src/simpo_pipeline/distributed/group.py",
        "if len(launches) > 1 or (len(whole) > 1 and not anyone_failed):",
        "if len(whole) > 1 and not anyone_failed:",
        "tests/distributed/test_group.py",
    ),
    Mutant(
        "each-process-agrees-with-itself",
        "src/simpo_pipeline/distributed/group.py",
        "return contributions[0].value",
        "return contributions[-1].value",
        "tests/distributed/test_group.py",
    ),
    Mutant(
        "verdict-names-the-majority",
        "src/simpo_pipeline/distributed/verdict.py",
        "rarest = min(identities, key=identities.count)",
        "rarest = max(identities, key=identities.count)",
        "tests/distributed/test_verdict.py",
    ),
    Mutant(
        "verdict-names-the-last-that-failed",
        "src/simpo_pipeline/distributed/verdict.py",
        "_, index = min(failed)",
        "_, index = max(failed)",
        "tests/distributed/test_verdict.py",
    ),
    Mutant(
        "stall-blamed-on-who-waits",
        "src/simpo_pipeline/distributed/verdict.py",
        "moving = [index for index, report in reports.items() if report.waiting is None]",
        "moving = [index for index, report in reports.items() if report.waiting is not None]",
        "tests/distributed/test_verdict.py",
    ),
    Mutant(
        "silence-measured-against-the-time-of-a-stall",
        "src/simpo_pipeline/distributed/verdict.py",
        "if silent > config.silence_seconds or",
        "if silent > config.stall_seconds or",
        "tests/distributed/test_verdict.py",
    ),
    Mutant(
        "meeting-taken-for-a-stall",
        "src/simpo_pipeline/distributed/standing.py",
        "stalled=self.waiting is None and deadline is not None",
        "stalled=deadline is not None",
        "tests/distributed/test_monitor.py",
    ),
    Mutant(
        "shardings-left-out-of-a-programs-fingerprint",
        "src/simpo_pipeline/distributed/programs.py",
        '"shardings": "\\n".join(shardings),',
        '"shardings": "",',
        "tests/distributed/test_programs.py",
    ),
    Mutant(
        "program-read-in-one-process-and-compiled-in-another",
        "src/simpo_pipeline/distributed/programs.py",
        "if not is_hit or all(hits):",
        "if not is_hit or any(hits):",
        "tests/distributed/test_compilation_cache.py",
    ),
    Mutant(
        "process-beyond-the-last-admitted",
        "src/simpo_pipeline/distributed/config.py",
        "int(index_text) < int(count_text)",
        "int(index_text) <= int(count_text)",
        "tests/distributed/test_config.py",
    ),
)

DATA = (
    Mutant(
        "pattern-wins-over-the-file-of-that-name",
        "src/simpo_pipeline/data/source_files.py",
        "_GLOB_CHARACTERS.search(source.path) and not exists(source.path)",
        "_GLOB_CHARACTERS.search(source.path)",
        "tests/data/test_record_formats.py",
    ),
    Mutant(
        "broken-link-left-out-of-a-pattern",
        "src/simpo_pipeline/data/source_files.py",
        "if name in files or name.endswith(ROW_SUFFIXES)",
        "if name in files",
        "tests/data/test_record_formats.py",
    ),
    Mutant(
        "one-of-two-columns-of-a-name-read",
        "src/simpo_pipeline/data/record_files.py",
        "if names.count(name) > 1:",
        "if names.count(name) > 2:",
        "tests/data/test_records.py",
    ),
    Mutant(
        "unread-key-of-a-message-ignored",
        "src/simpo_pipeline/data/messages.py",
        "if key not in known and not is_empty(value):",
        "if key in ():",
        "tests/data/test_record_formats.py",
    ),
    Mutant(
        "shard-ends-one-prompt-early",
        "src/simpo_pipeline/data/prompts.py",
        "stop = (process_index + 1) * num_prompts // process_count",
        "stop = ((process_index + 1) * num_prompts - 1) // process_count",
        "tests/data/test_prompts.py",
    ),
    Mutant(
        "prompt-token-unmasked-in-padded-rows",
        "src/simpo_pipeline/data/rows.py",
        "[_Piece(tokens[:-1], 0, 0, 0, tokens[start:], 2 * index + side)]",
        "[_Piece(tokens[:-1], 0, 0, 0, tokens[max(1, start - 1) :], 2 * index + side)]",
        "tests/data/test_rows.py",
    ),
    Mutant(
        "answers-of-packed-rows-placed-at-the-start",
        "src/simpo_pipeline/data/rows.py",
        "pieces.append(_Piece(fed, shared, ",
        "pieces.append(_Piece(fed, 0, ",
        "tests/data/test_rows.py",
    ),
    Mutant(
        "predictions-read-one-place-late",
        "src/simpo_pipeline/data/rows.py",
        "np.arange(start - count, start)",
        "np.arange(start - count, start) + 1",
        "tests/data/test_rows.py",
    ),
    Mutant(
        "answer-begins-one-token-late",
        "src/simpo_pipeline/data/chat.py",
        "return prompt, full[len(prompt) :], notes",
        "return prompt, full[len(prompt) + 1 :], notes",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "end-of-text-is-no-stop-token",
        "src/simpo_pipeline/data/chat.py",
        "ends.add(tokenizer.eos_token_id)",
        "pass",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "answer-tokenized-as-the-start-of-a-text",
        "src/simpo_pipeline/data/chat.py",
        " and tokenizer.decode([*prompt, *answer]) == wanted:",
        ":",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "answer-that-merges-with-the-prompt-kept-in-silence",
        "src/simpo_pipeline/data/chat.py",
        'if config.merged_border == "raise":',
        "if False:",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "loops-of-a-template-not-counted",
        "src/simpo_pipeline/data/template_sandbox.py",
        "node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))",
        "",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "message-cut-by-the-template-not-noticed",
        "src/simpo_pipeline/data/chat.py",
        "if content and start + content not in marked and content + end not in marked",
        "if content and content not in marked",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "special-tokens-of-messages-parsed-in-spite-of-plain",
        "src/simpo_pipeline/data/tokenizer.py",
        'stand_ins[text] = token["content"] = ',
        "stand_ins[text] = ",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "end-tokens-of-the-generation-config-ignored",
        "src/simpo_pipeline/data/tokenizer_files.py",
        "for file in (_MODEL_CONFIG, _GENERATION_CONFIG):",
        "for file in (_MODEL_CONFIG,):",
        "tests/data/test_tokenizer_files.py",
    ),
    Mutant(
        "order-without-the-runs-seed",
        "src/simpo_pipeline/data/order.py",
        "np.random.SeedSequence((seed, dataset))",
        "np.random.SeedSequence((0, dataset))",
        "tests/data/test_order.py",
    ),
    Mutant(
        "every-epoch-in-one-order",
        "src/simpo_pipeline/data/order.py",
        ".shuffle(seed=_seed_of(seed, number)).repeat()",
        ".shuffle(seed=_seed_of(seed, number)).repeat(reseed_each_epoch=False)",
        "tests/data/test_order.py",
    ),
    Mutant(
        "batches-overlap",
        "src/simpo_pipeline/data/loader.py",
        "range(step * self.batch_size, (step + 1) * self.batch_size)",
        "range(step * (self.batch_size - 1), step * (self.batch_size - 1) + self.batch_size)",
        "tests/data/test_loader.py",
    ),
    Mutant(
        "held-out-pairs-trained-on",
        "src/simpo_pipeline/data/split.py",
        "sides[is_held_out(",
        "sides[not is_held_out(",
        "tests/data/test_split.py",
    ),
    Mutant(
        "pair-of-the-full-length-refused",
        "src/simpo_pipeline/data/tokenize.py",
        "if pair.longest <= max_length:",
        "if pair.longest < max_length:",
        "tests/data/test_tokenize.py",
    ),
)

CONFIG_FILES = (
    Mutant(
        "text-flag-read-as-yaml",
        "src/simpo_pipeline/config_files/parse.py",
        "if not any(map(_is_text, members)):",
        "if members:",
        "tests/config_files/test_decode.py",
    ),
    Mutant(
        "unknown-key-accepted",
        "src/simpo_pipeline/config_files/check.py",
        'yield f"{self.source}: {inner_key} is not a setting; {self._nearest(str(name), key, hints)}{page}."',
        "yield from ()",
        "tests/config_files/test_decode.py",
    ),
    Mutant(
        "true-taken-for-a-number",
        "src/simpo_pipeline/config_files/check.py",
        "and (kind is bool or not isinstance(raw, bool))",
        "",
        "tests/config_files/test_decode.py",
    ),
    Mutant(
        "file-wins-over-the-command-line",
        "src/simpo_pipeline/config_files/decode.py",
        "merge(in_file, in_flags)",
        "merge(in_flags, in_file)",
        "tests/config_files/test_decode.py",
    ),
    Mutant(
        "quoted-true-taken-for-true",
        "src/simpo_pipeline/config_files/decode.py",
        "return float(raw) if kind is float else raw",
        'return float(raw) if kind is float else raw == "true" or raw',
        "tests/config_files/test_decode.py",
    ),
    Mutant(
        "key-given-twice-accepted",
        "src/simpo_pipeline/config_files/yaml_core.py",
        "if key in seen:",
        "if key in ():",
        "tests/config_files/test_decode.py",
    ),
)

MODEL = (
    Mutant(
        "gguf-rotary-halves-not-put-apart",
        "src/simpo_pipeline/model/gguf_weights.py",
        "pairs.swapaxes(1, 2).reshape(rows, embed)",
        "pairs.reshape(rows, embed)",
        "tests/model/test_gguf_weights.py",
    ),
    Mutant(
        "gguf-key-rows-left-in-pairs",
        "src/simpo_pipeline/model/gguf_weights.py",
        'if ".attn_q." not in tensor.name and ".attn_k." not in tensor.name:',
        'if ".attn_q." not in tensor.name:',
        "tests/model/test_gguf_weights.py",
    ),
    Mutant(
        "hf-weight-transposed",
        "src/simpo_pipeline/model/hf_weights.py",
        "layers[name].reshape(shape)",
        "layers[name].T.reshape(shape)",
        "tests/model/test_hf_weights.py",
    ),
    Mutant(
        "hf-gate-and-up-exchanged",
        "src/simpo_pipeline/model/hf_weights.py",
        '"w_gate": "mlp.gate_proj",\n    "w_up": "mlp.up_proj",',
        '"w_gate": "mlp.up_proj",\n    "w_up": "mlp.gate_proj",',
        "tests/model/test_transformers_parity.py",
    ),
    Mutant(
        "tied-head-untied",
        "src/simpo_pipeline/model/transformer.py",
        'head=None if config.tie_word_embeddings else normal("head")',
        'head=normal("head")',
        "tests/model/test_transformer.py",
    ),
    Mutant(
        "residual-around-attention-dropped",
        "src/simpo_pipeline/model/transformer.py",
        "placement.residual(hidden + attended)",
        "placement.residual(attended)",
        "tests/model/test_transformers_parity.py",
    ),
    Mutant(
        "rope-scaling-dropped",
        "src/simpo_pipeline/model/transformer.py",
        "if config.rope_scaling is None:",
        "if True:",
        "tests/model/test_transformer.py",
    ),
    Mutant(
        "own-head-of-a-tied-config-dropped",
        "src/simpo_pipeline/model/hf_weights.py",
        "if not config.tie_word_embeddings or not _has_own_head(tensors):",
        "if True:",
        "tests/model/test_hf_weights.py",
    ),
    Mutant(
        "cut-off-weights-taken-for-whole",
        "src/simpo_pipeline/model/safetensors_files.py",
        "if end != file_bytes:",
        "if False:",
        "tests/model/test_safetensors_files.py",
    ),
    Mutant(
        "gguf-tensors-that-overlap-read",
        "src/simpo_pipeline/model/gguf_file.py",
        "tensor.data_offset < end or (",
        "(",
        "tests/model/test_gguf_weights.py",
    ),
    Mutant(
        "end-token-outside-the-vocabulary-fetched",
        "steps/fetch_model.py",
        "0 <= index < config.vocab_size",
        "0 <= index",
        "tests/steps/test_fetch_model.py",
    ),
    Mutant(
        "keys-of-another-rope-type-ignored",
        "src/simpo_pipeline/model/config.py",
        "    if unknown:\n",
        "    if False:\n",
        "tests/model/test_config.py",
    ),
    Mutant(
        "untied-head-read-as-tied",
        "src/simpo_pipeline/model/config.py",
        'hf_config.get("tie_word_embeddings", False)',
        'hf_config.get("tie_word_embeddings", True)',
        "tests/model/test_config.py",
    ),
    Mutant(
        "axis-split-that-does-not-divide",
        "src/simpo_pipeline/model/sharding.py",
        " or axis.size % mesh.shape[mesh_axis]:",
        ":",
        "tests/model/test_sharding.py",
    ),
    Mutant(
        "first-layer-exported-for-all",
        "src/simpo_pipeline/model/hf_export.py",
        "place(np.int32(at), whole)",
        "place(np.int32(0), whole)",
        "tests/steps/test_export.py",
    ),
)

OPS = (
    Mutant(
        "rope-applied-to-the-wrong-half",
        "src/simpo_pipeline/ops/rope.py",
        "(first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin)",
        "(second * turn.cos - first * turn.sin, first * turn.cos + second * turn.sin)",
        "tests/ops/test_rope.py",
    ),
    Mutant(
        "gradient-of-rope-turned-on",
        "src/simpo_pipeline/ops/rope.py",
        "_turned(d_out, turn.cos, -turn.sin)",
        "_turned(d_out, turn.cos, turn.sin)",
        "tests/ops/test_rope.py",
    ),
    Mutant(
        "norm-by-the-sum-of-squares",
        "src/simpo_pipeline/ops/norm.py",
        "jnp.mean(wide * wide,",
        "jnp.sum(wide * wide,",
        "tests/ops/test_norm.py",
    ),
    Mutant(
        "norm-without-epsilon",
        "src/simpo_pipeline/ops/norm.py",
        "keepdims=True) + eps)",
        "keepdims=True))",
        "tests/ops/test_norm.py",
    ),
    Mutant(
        "gradient-of-the-normaliser-dropped",
        "src/simpo_pipeline/ops/logprobs.py",
        "(d_log_sum_T - d_logp_T)[:, None]",
        "(-d_logp_T)[:, None]",
        "tests/ops/test_logprobs.py",
    ),
    Mutant(
        "last-chunk-of-the-vocabulary-left-out",
        "src/simpo_pipeline/ops/logprobs.py",
        "return step(carry, num_full * chunk_size, rest) if rest else carry",
        "return carry",
        "tests/ops/test_logprobs.py",
    ),
    Mutant(
        "attention-reads-one-token-ahead",
        "src/simpo_pipeline/ops/attention.py",
        "dtype=bool), k=start)",
        "dtype=bool), k=start + 1)",
        "tests/ops/test_attention.py",
    ),
    Mutant(
        "attention-reads-across-segments",
        "src/simpo_pipeline/ops/attention.py",
        "return together & jnp.broadcast_to(causal, together.shape)",
        "return jnp.broadcast_to(causal, together.shape)",
        "tests/ops/test_attention.py",
    ),
    Mutant(
        "rejected-answer-reads-the-chosen-one",
        "src/simpo_pipeline/ops/attention.py",
        "together &= (keys == 0) |",
        "together &= (keys >= 0) |",
        "tests/training/test_step.py",
    ),
    Mutant(
        "paged-attention-mask-off-by-one",
        "src/simpo_pipeline/ops/paged_xla.py",
        "(key[None, None] <= positions_NR[:, :, None])",
        "(key[None, None] < positions_NR[:, :, None])",
        "tests/ops/test_paged_attention.py",
    ),
    Mutant(
        "token-of-no-page-written-to-the-last-one",
        "src/simpo_pipeline/ops/paged_attention_cpu.py",
        'set(_stored(tokens.k), mode="drop")',
        'set(_stored(tokens.k), mode="clip")',
        "tests/ops/test_paged_attention.py",
    ),
    Mutant(
        "gradient-of-a-weight-rounded-too-early",
        "src/simpo_pipeline/ops/linear.py",
        "return d_x, d_weight.reshape(weight.shape).astype(weight.dtype)",
        "return d_x, d_weight.reshape(weight.shape).astype(x.dtype).astype(weight.dtype)",
        "tests/ops/test_linear.py",
    ),
)

TRAINING = (
    Mutant(
        "gamma-with-the-other-sign",
        "src/simpo_pipeline/training/simpo.py",
        "(margins - config.gamma_beta_ratio)",
        "(margins + config.gamma_beta_ratio)",
        "tests/training/test_simpo.py",
    ),
    Mutant(
        "equal-answers-counted-as-right",
        "src/simpo_pipeline/training/simpo.py",
        "(margins > 0)",
        "(margins >= 0)",
        "tests/training/test_simpo.py",
    ),
    Mutant(
        "smoothing-with-the-same-sign",
        "src/simpo_pipeline/training/simpo.py",
        "smoothing * jax.nn.log_sigmoid(-x)",
        "smoothing * jax.nn.log_sigmoid(x)",
        "tests/training/test_simpo.py",
    ),
    Mutant(
        "summed-instead-of-average-log-probs",
        "src/simpo_pipeline/training/step.py",
        "averages = pair_logps / jnp.maximum(answer_lens, jnp.ones((), answer_lens.dtype))",
        "averages = pair_logps",
        "tests/training/test_step.py",
    ),
    Mutant(
        "accumulated-gradient-not-divided",
        "src/simpo_pipeline/training/step.py",
        "= 1 / num_pairs",
        "= num_parts / num_pairs",
        "tests/training/test_step.py",
    ),
    Mutant(
        "state-not-donated",
        "src/simpo_pipeline/training/step.py",
        "        donate_argnums=(0,),\n",
        "",
        "tests/training/test_step.py",
    ),
    Mutant(
        "moving-average-with-exchanged-weights",
        "src/simpo_pipeline/training/step.py",
        "decay * old + (1 - decay) * new",
        "decay * new + (1 - decay) * old",
        "tests/training/test_trainer.py",
    ),
    Mutant(
        "weight-decay-applied-to-norms",
        "src/simpo_pipeline/training/optimizer.py",
        "for axis in parameter.axes) > 1",
        "for axis in parameter.axes) > 0",
        "tests/training/test_optimizer.py",
    ),
    Mutant(
        "clip-ignored",
        "src/simpo_pipeline/training/optimizer.py",
        "optax.clip_by_global_norm(config.max_grad_norm),",
        "optax.identity(),",
        "tests/training/test_optimizer.py",
    ),
    Mutant(
        "warm-up-ends-one-update-late",
        "src/simpo_pipeline/training/optimizer.py",
        "decay], [warmup_steps])",
        "decay], [warmup_steps + 1])",
        "tests/training/test_optimizer.py",
    ),
    Mutant(
        "logged-learning-rate-one-update-ahead",
        "src/simpo_pipeline/training/trainer.py",
        "learning_rate_at(self.config.optimizer, self.config.num_train_steps, self.step)",
        "learning_rate_at(self.config.optimizer, self.config.num_train_steps, self.step + 1)",
        "tests/training/test_trainer.py",
    ),
    Mutant(
        "other-pairs-read-from-the-middle",
        "src/simpo_pipeline/training/trainer.py",
        "self._data_begins_after = self.step",
        "self._data_begins_after = 0",
        "tests/training/test_trainer.py",
    ),
    Mutant(
        "evaluation-is-a-mean-of-means",
        "src/simpo_pipeline/training/evaluation.py",
        ".get(name, self.num_pairs)",
        ".get(name, 1)",
        "tests/training/test_trainer.py",
    ),
    Mutant(
        "loss-that-is-not-finite-goes-on",
        "src/simpo_pipeline/training/trainer.py",
        "        if wrong:",
        "        if not metrics:",
        "tests/training/test_trainer.py",
    ),
    Mutant(
        "data-position-left-out-of-the-digest",
        "src/simpo_pipeline/training/state.py",
        "\\ndata_position {data_position}",
        "",
        "tests/training/test_state.py",
    ),
    Mutant(
        "checkpoint-digest-not-compared",
        "src/simpo_pipeline/training/checkpoints.py",
        "if digest != record.digest:",
        "if not digest:",
        "tests/steps/test_checkpoints.py",
    ),
)

INFERENCE = (
    Mutant(
        "page-freed-twice",
        "src/simpo_pipeline/inference/scheduler.py",
        "self.pool.release([source])",
        "self.pool.release([source, source])",
        "tests/inference/test_scheduler.py",
    ),
    Mutant(
        "page-freed-while-others-hold-it",
        "src/simpo_pipeline/inference/pages.py",
        "            if self._holders[page]:",
        "            if False:",
        "tests/inference/test_pages.py",
    ),
    Mutant(
        "shared-page-written-without-a-copy",
        "src/simpo_pipeline/inference/scheduler.py",
        "return self.pool.is_shared(sequence.pages[sequence.num_cached // self._config.page_size])",
        "return False",
        "tests/inference/test_scheduler.py",
    ),
    Mutant(
        "preemption-loses-generated-tokens",
        "src/simpo_pipeline/inference/scheduler.py",
        "self.num_preemptions += 1",
        "self.num_preemptions += 1; sequence.generated.clear()",
        "tests/inference/test_scheduler.py",
    ),
    Mutant(
        "preempted-sequence-keeps-its-place-in-the-cache",
        "src/simpo_pipeline/inference/scheduler.py",
        "        sequence.num_cached = 0",
        "        pass",
        "tests/inference/test_scheduler.py",
    ),
    Mutant(
        "stop-token-ignored",
        "src/simpo_pipeline/inference/sequence.py",
        "tokens[-1] in sampling.stop_tokens and",
        "tokens[-1] in () and",
        "tests/inference/test_scheduler.py",
    ),
    Mutant(
        "sampling-key-without-the-sample-index",
        "src/simpo_pipeline/inference/sampling.py",
        "for part in (step, prompt_index, sample_index, position.astype(jnp.uint32)):",
        "for part in (step, prompt_index, position.astype(jnp.uint32)):",
        "tests/inference/test_sampling.py",
    ),
    Mutant(
        "logits-that-are-not-finite-sampled-from",
        "src/simpo_pipeline/inference/engine.py",
        "    if not wrong:\n",
        "    if True:\n",
        "tests/inference/test_not_finite.py",
    ),
    Mutant(
        "value-stored-as-0-not-marked",
        "src/simpo_pipeline/inference/kv_cache.py",
        "NewTokens(_marked(k, v), v,",
        "NewTokens(k, v,",
        "tests/inference/test_not_finite.py",
    ),
    Mutant(
        "temperature-multiplied",
        "src/simpo_pipeline/inference/sampling.py",
        "(logits - peak) / temperature[:, None]",
        "(logits - peak) * temperature[:, None]",
        "tests/inference/test_sampling.py",
    ),
    Mutant(
        "top-p-one-token-short",
        "src/simpo_pipeline/inference/token_filters.py",
        "last = jnp.minimum(jnp.sum(mass < wanted[:, None], axis=-1), top.shape[1] - 1)",
        "last = jnp.clip(jnp.sum(mass < wanted[:, None], axis=-1) - 1, 0, top.shape[1] - 1)",
        "tests/inference/test_sampling.py",
    ),
    Mutant(
        "repetition-penalty-inverted",
        "src/simpo_pipeline/inference/token_filters.py",
        "jnp.where(logits > 0, logits / by_row, logits * by_row)",
        "jnp.where(logits > 0, logits * by_row, logits / by_row)",
        "tests/inference/test_sampling.py",
    ),
    Mutant(
        "seen-tokens-in-the-wrong-bits",
        "src/simpo_pipeline/inference/seen_tokens.py",
        'bitorder="little"',
        'bitorder="big"',
        "tests/inference/test_sampling_seen.py",
    ),
    Mutant(
        "log-probabilities-not-normalised",
        "src/simpo_pipeline/inference/logprobs.py",
        "axis=-1)[:, 0] - log_total",
        "axis=-1)[:, 0]",
        "tests/inference/test_sampling_logprobs.py",
    ),
    Mutant(
        "stop-string-over-two-tokens-missed",
        "src/simpo_pipeline/inference/stop_strings.py",
        "return any(text.find(string, max(start, known - len(string) + 1))",
        "return any(text.find(string, max(start, known))",
        "tests/inference/test_stop_strings.py",
    ),
    Mutant(
        "stop-string-kept-in-the-text",
        "src/simpo_pipeline/inference/text.py",
        "whole[start:], sampling.stop_strings, seen=",
        "whole[start:], (), seen=",
        "tests/inference/test_generated_rows.py",
    ),
    Mutant(
        "completion-decoded-without-its-prompt",
        "src/simpo_pipeline/inference/text.py",
        "start = known_length(texts_at_end(decode, prompt), whole)",
        "start, whole = 0, decode(tokens)",
        "tests/inference/test_text.py",
    ),
    Mutant(
        "stop-string-found-in-the-prompt",
        "src/simpo_pipeline/inference/stop_strings.py",
        "start = known_length(self._prompt_texts, text)",
        "start = 0",
        "tests/inference/test_text.py",
    ),
    Mutant(
        "frequency-penalty-subtracted-once",
        "src/simpo_pipeline/inference/logit_adjustments.py",
        "counts.astype(jnp.float32)) - once",
        "(counts > 0).astype(jnp.float32)) - once",
        "tests/inference/test_logit_adjustments.py",
    ),
    Mutant(
        "engine-sized-for-the-smallest-work",
        "src/simpo_pipeline/inference/sizing.py",
        "return cls(*map(max, zip(",
        "return cls(*map(min, zip(",
        "tests/inference/test_sizing.py",
    ),
    Mutant(
        "stop-tokens-drawn-before-the-least-number",
        "src/simpo_pipeline/inference/batches.py",
        "len(request.prompt_tokens) + sampling.min_tokens",
        "len(request.prompt_tokens)",
        "tests/inference/test_engine.py",
    ),
    Mutant(
        "chunk-fed-at-the-wrong-positions",
        "src/simpo_pipeline/inference/batches.py",
        "positions[start:end] = np.arange(chunk.start, position_end)",
        "positions[start:end] = np.arange(chunk.num_tokens)",
        "tests/inference/test_engine.py",
    ),
)

HANDOFF = (
    Mutant(
        "trainers-buffers-freed-by-the-borrower",
        "src/simpo_pipeline/handoff/handoff.py",
        "if not self.shared:",
        "if True:",
        "tests/handoff/test_handoff.py",
    ),
    Mutant(
        "weights-handed-over-without-the-cast",
        "src/simpo_pipeline/handoff/handoff.py",
        "array = array.astype(wanted.dtype)",
        "array = array.astype(held.dtype)",
        "tests/handoff/test_handoff.py",
    ),
    Mutant(
        "another-dtype-taken-for-a-fit",
        "src/simpo_pipeline/handoff/handoff.py",
        "return held.dtype == wanted.dtype and wanted",
        "return wanted",
        "tests/handoff/test_handoff.py",
    ),
)

PREFLIGHT = (
    Mutant(
        "sizes-read-in-bits",
        "src/simpo_pipeline/preflight/hlo.py",
        "* _bits(dtype) // 8",
        "* _bits(dtype)",
        "tests/preflight/test_hlo.py",
    ),
    Mutant(
        "body-of-a-loop-counted-once",
        "src/simpo_pipeline/preflight/hlo.py",
        "visit(called, times * turns,",
        "visit(called, times,",
        "tests/preflight/test_hlo.py",
    ),
    Mutant(
        "all-reduce-received-once",
        "src/simpo_pipeline/preflight/collectives.py",
        '(2 if kind == "all-reduce" else 1)',
        "1",
        "tests/preflight/test_hlo.py",
    ),
    Mutant(
        "roofline-of-one-link",
        "src/simpo_pipeline/preflight/roofline.py",
        "received_bytes / (num_links * chip.link_bytes_per_second)",
        "received_bytes / chip.link_bytes_per_second",
        "tests/preflight/test_roofline.py",
    ),
    Mutant(
        "multiply-add-counted-as-one-operation",
        "src/simpo_pipeline/preflight/roofline.py",
        "linear = 2 * layer_parameters(model)",
        "linear = layer_parameters(model)",
        "tests/preflight/test_roofline.py",
    ),
    Mutant(
        "arguments-in-place-counted-twice",
        "src/simpo_pipeline/preflight/memory.py",
        "self.outputs - self.aliased +",
        "self.outputs +",
        "tests/preflight/test_report.py",
    ),
    Mutant(
        "what-lives-beside-a-program-fits-for-nothing",
        "src/simpo_pipeline/preflight/report.py",
        "if phase.total > capacity",
        "if phase.needs > capacity",
        "tests/preflight/test_report.py",
    ),
    Mutant(
        "hosts-of-eight-chips",
        "src/simpo_pipeline/preflight/topology.py",
        "return self.num_chips // 4",
        "return self.num_chips // 8",
        "tests/preflight/test_topology.py",
    ),
)

STEPS = (
    Mutant(
        "no-generation-after-the-last-update",
        "experiments/schedule.py",
        "range(eval_every, num_train_steps + 1, eval_every)",
        "range(eval_every, num_train_steps, eval_every)",
        "tests/experiments/test_schedule.py",
    ),
    Mutant(
        "tracker-flag-ignored",
        f"{PACKAGE}/job/main.py",
        "kind = flags.tracker or choice.kind",
        "kind = choice.kind",
        "tests/job/test_main.py",
    ),
    Mutant(
        "held-out-pairs-in-the-training-file",
        "steps/bodies/prepare_pairs.py",
        "write_pairs(file, training)",
        "write_pairs(file, pairs)",
        "tests/steps/test_prepare_pairs.py",
    ),
    Mutant(
        "wheel-of-any-version-taken",
        "steps/fetch_model.py",
        " and importlib.metadata.version(name) == version:",
        ":",
        "tests/steps/test_fetch_model.py",
    ),
    Mutant(
        "missing-rows-of-a-host-not-noticed",
        "src/simpo_pipeline/inference/row_files.py",
        "        if count < len(wanted):",
        "        if count > len(wanted):",
        "tests/steps/test_infer.py",
    ),
    Mutant(
        "engine-sized-for-the-most-memory",
        "steps/bodies/infer.py",
        'min(host["memory_bytes"] for host in hosts)',
        'max(host["memory_bytes"] for host in hosts)',
        "tests/steps/test_infer.py",
    ),
    Mutant(
        "trainer-after-another-update-accepted",
        "steps/bodies/infer.py",
        "config.trainer.step != config.step",
        "config.trainer.step < 0",
        "tests/steps/test_infer.py",
    ),
    Mutant(
        "trainer-of-another-run-accepted",
        "steps/train.py",
        "if trainer != own:",
        "if own is None:",
        "tests/steps/test_train.py",
    ),
    Mutant(
        "checkpoint-written-one-update-off",
        "src/simpo_pipeline/training/phase_checkpoints.py",
        "self._trainer.step % every == 0",
        "self._trainer.step % every == every - 1",
        "tests/steps/test_checkpoints.py",
    ),
    Mutant(
        "gamma-of-the-file-not-passed-on",
        "experiments/settings/train_simpo.py",
        "                gamma_beta_ratio=self.gamma_beta_ratio,\n",
        "",
        "tests/experiments/test_settings_train_simpo.py",
    ),
)

LAUNCHER = (
    Mutant(
        "secret-printed",
        "infra/launcher/console.py",
        'text = text.replace(secret, "***")',
        "text = text.replace(secret, secret)",
        "tests/infra/test_launcher_regressions.py",
    ),
    Mutant(
        "token-is-no-secret",
        "infra/launcher/environment.py",
        'r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL"',
        'r"KEY|SECRET|PASSW|CREDENTIAL"',
        "tests/infra/test_launcher_regressions.py",
    ),
    Mutant(
        "retry-after-a-genuine-failure",
        "infra/launcher/tpu_vm.py",
        "raise JobFailed(message, failed.state.exit_code or 1)",
        "raise TpuLost(message)",
        "tests/infra/test_tpu_failures.py",
    ),
    Mutant(
        "one-retry-more-than-asked-for",
        "infra/launcher/tpu_vm.py",
        "if 0 <= self._options.retries < attempt:",
        "if 0 <= self._options.retries < attempt - 1:",
        "tests/infra/test_tpu_failures.py",
    ),
    Mutant(
        "command-not-quoted",
        "infra/launcher/docker_job.py",
        "{shlex.join([self.image, *job.command])}",
        "{' '.join([self.image, *job.command])}",
        "tests/infra/test_launcher_regressions.py",
    ),
    Mutant(
        "variables-not-quoted",
        "infra/launcher/bare_job.py",
        "{name}={shlex.quote(value)}",
        "{name}={value}",
        "tests/infra/test_launcher_regressions.py",
    ),
    Mutant(
        "failed-host-counted-as-success",
        "infra/launcher/outcome.py",
        " and self.state.exit_code == 0",
        "",
        "tests/infra/test_outcome.py",
    ),
    Mutant(
        "host-heard-of-first-is-blamed",
        "infra/launcher/outcome.py",
        "key=lambda each: (not each[1], each[1])",
        "key=lambda each: 0",
        "tests/infra/test_outcome.py",
    ),
    Mutant(
        "half-a-line-believed-when-a-repetition-follows-it",
        "infra/launcher/ssh_feed.py",
        'line.endswith("\\n") and not line.endswith(f"{_START}\\n")',
        'line.endswith("\\n")',
        "tests/infra/test_tpu_failures.py",
    ),
    Mutant(
        "lines-told-again-after-a-broken-connection",
        "infra/launcher/ssh_feed.py",
        "int(number) >= first:",
        "int(number) >= 0:",
        "tests/infra/test_tpu_failures.py",
    ),
    Mutant(
        "cores-counted-as-chips",
        "infra/launcher/accelerators.py",
        "return self.size // self.generation.cores_per_chip",
        "return self.size",
        "tests/infra/test_accelerators.py",
    ),
    Mutant(
        "tpu-of-another-type-used",
        "infra/launcher/provisioning.py",
        "if node.accelerator_type != wanted:",
        "if not node.accelerator_type:",
        "tests/infra/test_tpu_failures.py",
    ),
    Mutant(
        "killed-pod-started-again",
        "infra/launcher/jobset.py",
        "_SIGTERM_EXIT_CODES = [143]",
        "_SIGTERM_EXIT_CODES = [137, 143]",
        "tests/infra/test_gke.py",
    ),
    Mutant(
        "every-local-process-is-the-leader",
        "infra/launcher/local.py",
        '"JAX_PROCESS_ID": str(index)',
        '"JAX_PROCESS_ID": str(0)',
        "tests/infra/test_launch.py",
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *EXECUTOR,
    *STORAGE,
    *TRACKING,
    *DISTRIBUTED,
    *DATA,
    *CONFIG_FILES,
    *MODEL,
    *OPS,
    *TRAINING,
    *INFERENCE,
    *HANDOFF,
    *PREFLIGHT,
    *STEPS,
    *LAUNCHER,
)


def find_problems(tree: pathlib.Path, mutants: Sequence[Mutant] = MUTANTS) -> list[str]:
    """Return one sentence for each reason why a mutant cannot be applied to a checkout."""
    problems = [f"{name}: the name is given twice" for name, count in _counts(mutants).items() if count > 1]
    for mutant in mutants:
        path = tree / mutant.file
        if not path.is_file():
            problems.append(f"{mutant.name}: there is no file {mutant.file}")
            continue
        text = path.read_text(encoding="utf-8")
        times = text.count(mutant.before)
        if times != 1:
            problems.append(f"{mutant.name}: `before` occurs {times} times in {mutant.file}, not once")
        elif mutant.before == mutant.after:
            problems.append(f"{mutant.name}: `after` is `before`")
        else:
            try:
                ast.parse(text.replace(mutant.before, mutant.after))
            except SyntaxError as error:
                problems.append(f"{mutant.name}: {mutant.file} is no Python any more: {error}")
        if not (tree / mutant.caught_by).is_file():
            problems.append(f"{mutant.name}: there is no test file {mutant.caught_by}")
    return problems


def _counts(mutants: Sequence[Mutant]) -> collections.Counter[str]:
    return collections.Counter(mutant.name for mutant in mutants)


@dataclasses.dataclass(frozen=True)
class TestRun:
    """Result of one run of one test file.

    Attributes:
        outcome: "passed", "failed", "timed out", or "invalid": the tests could not be run.
        first_failed: Name that pytest gives to the first failed test, or "" if no test failed.
        seconds: Duration of the run.
        output: Output of pytest.
    """

    outcome: str
    first_failed: str
    seconds: float
    output: str


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of the tests for one mutant."""

    mutant: Mutant
    run: TestRun

    @property
    def is_caught(self) -> bool:
        """Whether the test file failed or timed out."""
        return self.run.outcome in ("failed", "timed out")

    @property
    def verdict(self) -> str:
        """The result in one word."""
        return {"failed": "caught", "timed out": "caught", "passed": "SURVIVED"}.get(self.run.outcome, "INVALID")

    @property
    def by(self) -> str:
        """The test or test file that caught the mutant."""
        if self.run.outcome == "timed out":
            return f"{self.mutant.caught_by}, which did not end within {TIMEOUT_SECONDS:.0f} s"
        return self.run.first_failed or self.mutant.caught_by


class Copy:
    """Copy of a checkout in which faults can be made and tests can run."""

    def __init__(self, tree: pathlib.Path, folder: pathlib.Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        for name in _files_of(tree):
            source, target = tree / name, folder / name
            if source.is_file():  # skips a file that is deleted without a commit
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        self._require_own_code()

    def test(self, test_file: str, mutant: Mutant | None = None) -> TestRun:
        """Run a test file while the code has the fault of `mutant`, or no fault if it is None."""
        if mutant is None:
            return self._run(test_file)
        path = self.folder / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        try:
            return self._run(test_file)
        finally:
            path.write_text(text, encoding="utf-8")

    def _run(self, test_file: str) -> TestRun:
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", test_file]
        started = time.monotonic()
        # The output goes to a file, because a process left by a test would keep a pipe open.
        with tempfile.TemporaryFile() as output_file:
            self._process = subprocess.Popen(
                argv,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = self._process.wait(TIMEOUT_SECONDS)
                outcome = {0: "passed", 1: "failed"}.get(code, "invalid")
            except subprocess.TimeoutExpired:
                outcome = "timed out"
            finally:
                self.stop()
            output_file.seek(0)
            output = output_file.read().decode(errors="replace")
        found = _FIRST_FAILED.search(output)
        return TestRun(outcome, found[1] if found else "", time.monotonic() - started, output)

    def stop(self) -> None:
        """Kill the current run, and the processes that a run left in its session."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _environment(self) -> Mapping[str, str]:
        """Return our environment with the code of this copy first, for the tests and the programs that they start."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join([str(self.folder / "src"), str(self.folder)]),
            # Python detects outdated bytecode by size and time of a file, which a fault may leave unchanged.
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _require_own_code(self) -> None:
        code = "import simpo_pipeline, steps; print(simpo_pipeline.__file__); print(steps.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tempfile.gettempdir(),
            env=self._environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        for path in done.stdout.split():
            if not pathlib.Path(path).is_relative_to(self.folder):
                raise SystemExit(f"The tests would import {path}, which is not of the copy in {self.folder}.")


def _files_of(tree: pathlib.Path) -> list[str]:
    """Return the files that git tracks, and the untracked files that it does not ignore."""
    argv = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return sorted({name for name in done.stdout.split("\0") if name})


class Workplace:
    """Copies of a checkout, one for each parallel job."""

    def __init__(self, tree: pathlib.Path, folder: pathlib.Path, num_jobs: int) -> None:
        self._copies = [Copy(tree, folder / f"copy_{number}") for number in range(num_jobs)]
        self._idle: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in self._copies:
            self._idle.put(copy)
        self._pool = concurrent.futures.ThreadPoolExecutor(num_jobs)

    def __enter__(self) -> "Workplace":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for copy in self._copies:  # a copy may still run a test file after Ctrl-C
            copy.stop()
        self._pool.shutdown()

    def failing_files(self, test_files: Sequence[str]) -> list[str]:
        """Return the test files that fail without a fault, and print their output."""
        failing: list[str] = []
        for test_file, run in zip(test_files, self._pool.map(lambda name: self._test(name), test_files), strict=True):
            print(f"{run.outcome:<9} {run.seconds:6.1f} s  {test_file}, without a fault", flush=True)
            if run.outcome != "passed":
                print(run.output, flush=True)
                failing.append(test_file)
        return failing

    def results(self, mutants: Sequence[Mutant]) -> list[Result]:
        """Test the mutants and return the results in order. Each result is printed as soon as it is known."""
        found: list[Result] = []
        runs = self._pool.map(lambda mutant: self._test(mutant.caught_by, mutant), mutants)
        for mutant, run in zip(mutants, runs, strict=True):
            result = Result(mutant, run)
            print(f"{result.verdict:<9} {run.seconds:6.1f} s  {mutant.name}: {result.by}", flush=True)
            if run.outcome == "invalid":
                print(run.output, flush=True)
            found.append(result)
        return found

    def _test(self, test_file: str, mutant: Mutant | None = None) -> TestRun:
        copy = self._idle.get()
        try:
            return copy.test(test_file, mutant)
        finally:
            self._idle.put(copy)


def as_markdown(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| fault | file | caught by |", "|---|---|---|"]
    for result in results:
        by = f"`{result.by}`" if result.run.outcome == "failed" else result.by if result.is_caught else result.verdict
        lines.append(f"| {result.mutant.name.replace('-', ' ')} | `{result.mutant.file}` | {by} |")
    text = (
        "# Faults that the tests notice\n\n"
        "Each fault was put into a copy of the code, and the test file was run that should fail. This page is written "
        "by\n`uv run python tests/mutants.py --write docs/mutants.md`.\n\n"
    )
    return text + "\n".join(lines) + f"\n\n{_summary(results)}\n"


def _summary(results: Sequence[Result]) -> str:
    counts = collections.Counter(result.verdict for result in results)
    text = f"{len(results)} mutants: {counts['caught']} caught, {counts['SURVIVED']} survived"
    return text + (f", {counts['INVALID']} invalid" if counts["INVALID"] else "")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="only these mutants")
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, metavar="PATH", help="the checkout to test")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="write a Markdown table of the results")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="test files that run at a time")
    parser.add_argument("--check", action="store_true", help="only check that every mutant applies")
    flags = parser.parse_args(words)
    unknown = sorted(set(flags.only) - set(_counts(MUTANTS)))
    if unknown:
        parser.error(f"there is no mutant {', '.join(unknown)}")
    if flags.jobs < 1:
        parser.error(f"--jobs is {flags.jobs}; give a number of at least 1")
    return flags


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    flags = _parse(words)
    tree: pathlib.Path = flags.tree.resolve()
    mutants = [mutant for mutant in MUTANTS if not flags.only or mutant.name in flags.only]
    problems = find_problems(tree, mutants)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems or flags.check:
        print(f"{len(mutants)} mutants: {len(problems)} problems")
        return 2 if problems else 0
    with (
        tempfile.TemporaryDirectory(prefix="simpo_mutants_") as folder,
        Workplace(tree, pathlib.Path(folder).resolve(), flags.jobs) as workplace,
    ):
        failing = workplace.failing_files(sorted({mutant.caught_by for mutant in mutants}))
        if failing:
            print(f"Without any fault these fail already: {', '.join(failing)}", file=sys.stderr)
            return 2
        results = workplace.results(mutants)
    print(_summary(results))
    if flags.write is not None:
        flags.write.parent.mkdir(parents=True, exist_ok=True)
        flags.write.write_text(as_markdown(results), encoding="utf-8")
    return 0 if all(result.is_caught for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
