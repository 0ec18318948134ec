"""Small tokenizers of five kinds, made with the `tokenizers` library. Nothing is downloaded."""

import json
import pathlib
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from simpo_pipeline.data.byte_tokenizer import write_byte_tokenizer

# Words that begin with a blank and do not, digits, line breaks, blanks in a row, and characters of two to four bytes.
TEXTS = (
    "The capital of France is Paris and the capital of Japan is Tokyo.\n\nIt has 2,102,650 inhabitants in 2023.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3\n\t- item one\n\t- item two",
    "Le café à la carte, déjà vu; naïve façade. Über die Straße. Ёлка и снег.",
    "東京は日本の首都です。こんにちは、世界。 你好。 안녕하세요",
    "Emoji 🎉🎉 and 👩‍👩‍👧, the end… “quoted” dashes — here.",
)
_SPECIAL = ("<unk>", "<s>", "</s>")
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained_on_bytes(split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(_SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    """Return a byte-level BPE tokenizer like GPT-2's."""
    return _trained_on_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False))


def split_regex() -> Tokenizer:
    """Return a byte-level BPE tokenizer that splits texts with a regular expression, like tiktoken's."""
    split = pre_tokenizers.Split(Regex(_TIKTOKEN), behavior="isolated")
    return _trained_on_bytes(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


def byte_fallback() -> Tokenizer:
    """Return a BPE tokenizer like Llama 2's: a blank before each text, and bytes for what has no piece."""
    pieces = sorted(set("".join(TEXTS[:2])) - {" "})
    words = ("Paris", "and", "is", "the", "of")
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"])}
    merges: list[tuple[str, str]] = []

    def add(token: str) -> None:
        vocab.setdefault(token, len(vocab))

    for piece in (*pieces, "é", "日"):
        add(piece)
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            add(word[:end])
        merges.append(("▁", word))
        add(f"▁{word}")
    for length in (1, 2):
        merges.append(("▁" * length, "▁" * length))
        add("▁" * 2 * length)
    tokenizer = Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer


def unigram() -> Tokenizer:
    """Return a unigram tokenizer with a blank before each word, like T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(_SPECIAL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def single_bytes(folder: pathlib.Path) -> Tokenizer:
    """Return the byte tokenizer of this project."""
    write_byte_tokenizer(str(folder))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "split_regex": split_regex,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
}


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path, **roles: object) -> None:
    """Write a tokenizer without a chat template as Hugging Face's files."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
