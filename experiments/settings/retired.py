"""Retired settings that old settings files may still contain, and what to do instead.

The texts follow "KEY is retired: " in the error message. A star stands for the name of any component.
"""

from collections.abc import Mapping

_EMPTY_CACHE = "every generation starts with an empty cache and frees it at its end, so leave the key out"
_KERNELS = "attention chooses its kernel and block sizes by backend and shape, so leave the key out"
_LOGGING = "trackers launch no device programs, so rows and metrics are logged as soon as they exist; leave the key out"
_HELD_OUT = "set validation_split_fraction, which holds out part of the training data; leave the key out"
_EXPORT = "the trained weights are written with the flag --export fp32 or bf16, so leave the key out"
_PAIRS_OUTPUT = "tokenized pairs are the output of a separate step below --prefix, so leave the key out"
_ORDER = "pairs are always shuffled, differently in each epoch, by trainer.seed, so leave the key out"
_ROWS = "rows are outputs of their step below --prefix, one file per host and one merged file, so leave the key out"

_ENGINE: Mapping[str, str] = {
    "hbm_utilization": "the cache is sized by prompts and available memory, so leave the key out, or set max_pages",
    "max_tokens_per_round": "all running sequences decode in every round; set max_seqs to limit their number",
    "max_queued_tokens": "there is no queue of tokens between prefill and decode, so leave the key out",
    "max_seqs_in_prefill": "prompts wait until pages are free, and no prompt is dropped, so leave the key out",
    "reset_mode": _EMPTY_CACHE,
    "cleanup_mode": _EMPTY_CACHE,
    "use_logical_reset": _EMPTY_CACHE,
    "incremental_cleanup": _EMPTY_CACHE,
    "max_stop_seqs": "stop tokens need no separate buffer, so leave the key out",
    "max_stop_tokens": "stop tokens need no separate buffer, so leave the key out",
}

_MODEL: Mapping[str, str] = {
    "model.flash_attention_block_size": _KERNELS,
    "model.use_tpu_ragged_paged_attention": _KERNELS,
    "model.ragged_paged_q_block_size": _KERNELS,
    "model.ragged_paged_kv_block_pages": _KERNELS,
    "model.use_bias": "a Llama has no biases, so leave the key out",
    "model.use_layer_norm_weight": "a Llama's norms always have weights, so leave the key out",
}

_TRAINER: Mapping[str, str] = {
    "trainer.mesh": "training is sharded over all devices (see trainer.tensor_parallel), an engine over those of its "
    "host or of all hosts (see inference_mode), so leave the key out",
    "trainer.ray": "the job runs as one process per host and starts no cluster, so leave the key out",
    "trainer.tracker.tags": "a run has a name and no tags; set trainer.tracker.name",
}

TRAIN_SIMPO: Mapping[str, str] = {
    **_MODEL,
    **_TRAINER,
    **{f"inference_eval.{name}": words for name, words in _ENGINE.items()},
    "engine": "set the engine's sizes under inference_eval; only the sampler has a section engine",
    "max_prompts_per_batch": "set inference_eval.max_seqs, which limits how many sequences run at once",
    "inference_eval.max_logged_samples": "the tracker gets the first 16 rows of a step, and the step's files have all "
    "rows; leave the key out",
    "inference_eval.allow_multihost": "generation runs on any number of hosts; set inference_eval.enabled to false",
    "inference_eval.host_data_parallel_output_dir": _ROWS,
    "data.shuffle": _ORDER,
    "data.permutation_type": _ORDER,
    "data.cache_dir": _PAIRS_OUTPUT,
    "data.components.*.cache_dir": _PAIRS_OUTPUT,
    "data.components.*.source.validation_urls": _HELD_OUT,
    "trainer.per_device_parallelism": "an update runs its batch in trainer.grad_accumulation parts, one by default, so "
    "leave the key out",
    "trainer.per_device_eval_parallelism": "held-out pairs are batched like training pairs, so leave the key out",
    "trainer.model_averaging": "set trainer.ema_decay, the decay of a moving average of the weights, or leave it out",
    "trainer.checkpointer": "checkpoints are written with the flags --checkpoint.when and --checkpoint.every, so leave "
    "the key out",
    "trainer.initialize_from": "set initialize_from_hf to a model in Hugging Face layout",
    "trainer.id": "outputs are named by the identity of their step; set trainer.tracker.name to name the run",
    "optimizer.type": "the optimizer is AdamW, so leave the key out",
    "use_hf_model_config": "a checkpoint's config.json is always used, so leave the key out",
    "hf_save_path": _EXPORT,
    "hf_upload": _EXPORT,
    "hf_save_steps": _EXPORT,
    "hf_save_dtype": _EXPORT,
    "data_seed": "set trainer.seed, which also determines the order of the data",
    "initialize_from_checkpoint_path": "set initialize_from_hf to a model in Hugging Face layout",
}

SAMPLE_LM_MULTIHOST: Mapping[str, str] = {
    **_MODEL,
    **_TRAINER,
    **{f"engine.{name}": words for name, words in _ENGINE.items()},
    "engine.compute_dtype": "the cache has the dtype of the computation; set trainer.mp",
    "engine.seed": "set seed at the top of the file",
    "engine.devices": "an engine runs on all devices of its host, so leave the key out",
    "engine.debug_stats_every_n": "progress is always logged, so leave the key out",
    "engine.log_decode_perf_summary": "speeds are always in summary.json, so leave the key out",
    "max_prompts_per_batch": "set engine.max_seqs, which limits how many sequences run at once",
    "checkpoint_path": "set hf_checkpoint to a model in Hugging Face layout",
    "n_rounds": "an engine serves all requests in one call; set n_generations for several samples per prompt",
    "enable_host_rows_gather": "the merged file is always written, so leave the key out",
    "host_data_parallel_output_dir": _ROWS,
    "log_kernel_jaxprs_path": "set XLA_FLAGS=--xla_dump_to=FOLDER in the environment instead",
    "skip_round_barrier": "there are no rounds and no barriers between them, so leave the key out",
    "force_post_generate_block_until_ready": _LOGGING,
    "force_post_generate_barrier": _LOGGING,
    "barrier_before_leader_postprocess": _LOGGING,
    "skip_leader_postprocess": _LOGGING,
    "leader_postprocess_sleep_sec": _LOGGING,
    "skip_samples_table": _LOGGING,
    "force_samples_rows_log": _LOGGING,
    "skip_metrics_log": _LOGGING,
    "emit_minimal_tracker_probe": _LOGGING,
    "emit_minimal_tracker_probe_all_hosts": _LOGGING,
    "defer_tracker_logs_until_end": _LOGGING,
}
