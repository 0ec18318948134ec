"""A byte-level tokenizer in Hugging Face's file format, for models with random weights; nothing is downloaded.

Token ids below 256 are byte values; five special tokens follow. The chat template is ChatML.
"""

import json

from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join

BOS, EOS, PAD, TURN_START, TURN_END = "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, TURN_START, TURN_END)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_byte_tokenizer(out_dir: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json under `out_dir` (any fsspec path).

    Raises:
        StorageError: a file cannot be written.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # not needed for planning

    # A byte-level tokenizer represents each byte by a visible character. A byte without one of its own gets a spare.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spare = iter(sorted(character for character in alphabet if ord(character) > 255))
    vocab = {chr(byte) if chr(byte) in alphabet else next(spare): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    write_json(join(out_dir, "tokenizer.json"), json.loads(tokenizer.to_str()))
    write_json(
        join(out_dir, "tokenizer_config.json"),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "additional_special_tokens": [TURN_START, TURN_END],
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    write_json(join(out_dir, "special_tokens_map.json"), roles)
