"""The model that most tests of this room generate with."""

from simpo_pipeline.model.config import LlamaConfig

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    max_seq_len=256,
    initializer_range=0.2,  # far from uniform logits, so that no argmax is a near tie
    tie_word_embeddings=True,
)
