"""A tiny model and its pairs, made by the steps themselves, for tests of single step functions."""

import dataclasses
import json

import pytest

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.job.session import JobSession
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.config import OptimizerConfig, TrainerConfig
from steps.make_model import MakeModelConfig, make_model
from steps.prepare_pairs import PreparePairsConfig, prepare_pairs

TINY_LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=264,
    max_seq_len=128,
    tie_word_embeddings=True,
)
TRAINER = TrainerConfig(
    num_train_steps=3, train_batch_size=2, train_seq_len=96, optimizer=OptimizerConfig(learning_rate=1e-3)
)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "out")
    make_model(MakeModelConfig(TINY_LLAMA), OutputFolder(path))
    return path


@pytest.fixture(scope="session")
def pairs_path(tmp_path_factory, model_path):
    folder = tmp_path_factory.mktemp("pairs")

    def conversation(index, answer):
        return [{"role": "user", "content": f"{index} + 1?"}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": conversation(i, str(i + 1)), "rejected": conversation(i, "no idea")} for i in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PreparePairsConfig(
        source=PreferenceSource(path=str(folder / "pairs.jsonl")),
        model_path=model_path,
        max_length=TRAINER.train_seq_len,
        validation_fraction=0.5,
    )
    output = OutputFolder(str(folder / "out"))
    prepare_pairs(config, output)
    return output.path


@pytest.fixture(scope="module")
def session():
    """Return one session for the tests of a file, so that each program is compiled once."""
    session = JobSession()
    yield session
    session.close(None)


@pytest.fixture
def step_run(session, tmp_path):
    """Return the run that the executor hands to a step function, in a job of one process."""
    return StepRun("step", OutputFolder(str(tmp_path)), Processes(), session, plan=(), replaying=False)


@pytest.fixture
def trainer_config():
    return dataclasses.replace(TRAINER)
