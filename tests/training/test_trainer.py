"""The trainer's invariant, its ownership of the state, and the calls it refuses."""

import dataclasses
import math
from collections import Counter

import jax
import numpy as np
import pytest

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.order import Mixture
from simpo_pipeline.data.rows import RowShape
from simpo_pipeline.data.sweep import PairSweep
from simpo_pipeline.errors import ConfigError, DataError, TrainingError
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.tracking.tracker import NoTracker
from simpo_pipeline.training import trainer as trainer_module
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig
from simpo_pipeline.training.evaluator import Evaluator
from simpo_pipeline.training.optimizer import learning_rate_at
from simpo_pipeline.training.trainer import Trainer


def ignore(step: int, metrics: dict[str, float]) -> None:
    """Ignore an update: an `on_step` for tests that only look at the trainer."""


@pytest.fixture
def start(tiny_model, tiny_run, programs, one_device):
    """Return a function that starts a run at update 0; keyword arguments change its config."""

    def start_run(**changes) -> Trainer:
        config = dataclasses.replace(tiny_run, **changes)
        return Trainer.start_random(config, tiny_model, programs=programs, mesh=one_device)

    return start_run


AVERAGED = {"packing": True, "grad_accumulation": 2, "ema_decay": 0.9}


@pytest.mark.parametrize("changes", [{}, AVERAGED], ids=str)
def test_interleaving_changes_nothing(changes, start, tiny_run, five_pairs, make_loader):
    loader = make_loader(five_pairs, dataclasses.replace(tiny_run, **changes))
    whole, interleaved = start(**changes), start(**changes)
    whole.train_until(7, loader, ignore)
    interleaved.train_until(2, loader, ignore)
    after_two = interleaved.digest()
    np.asarray(interleaved.params.embedding.array)  # a borrower may read
    assert interleaved.digest() == after_two
    interleaved.train_until(7, loader, ignore)
    assert interleaved.digest() == whole.digest()
    assert (whole.step, whole.data_position) == (7, 14)


def test_other_pairs_are_read_from_their_beginning_and_the_same_pairs_continue(
    start, tiny_run, five_pairs, make_loader, monkeypatch
):
    read: list[tuple[int, ...]] = []
    serve = PairLoader.batch

    def record(self: PairLoader, step: int):
        read.extend(tuple(self.pairs[index].chosen_tokens) for index in self.indices(step))
        return serve(self, step)

    monkeypatch.setattr(PairLoader, "batch", record)
    trainer = start()
    trainer.train_until(3, make_loader(five_pairs, tiny_run), ignore)
    # The same pairs, stored elsewhere under other names.
    renamed = [dataclasses.replace(pair, prompt_id=f"renamed-{pair.prompt_id}") for pair in five_pairs]
    trainer.train_until(5, make_loader(renamed, tiny_run), ignore)
    assert trainer.data_position == 10
    assert Counter(read) == {tuple(pair.chosen_tokens): 2 for pair in five_pairs}
    read.clear()
    others = [dataclasses.replace(pair, chosen_tokens=pair.chosen_tokens[::-1].copy()) for pair in five_pairs[:4]]
    trainer.train_until(6, make_loader(others, tiny_run), ignore)
    trainer.train_until(7, make_loader(others, tiny_run), ignore)
    assert Counter(read) == {tuple(pair.chosen_tokens): 1 for pair in others}
    assert (trainer.step, trainer.data_position) == (7, 4)


@pytest.mark.parametrize("packing", [False, True])
def test_other_pairs_that_are_no_longer_compile_nothing(
    packing, start, tiny_run, five_pairs, make_loader, programs, monkeypatch
):
    config = dataclasses.replace(tiny_run, packing=packing)
    trainer = start(packing=packing)
    trainer.train_until(1, make_loader(five_pairs, config), ignore)
    trainer.evaluate(PairSweep(five_pairs, batch_size=2, seq_len=16, pad_id=0, packing=packing))
    shorter = [
        dataclasses.replace(pair, chosen_tokens=pair.chosen_tokens[:-1], rejected_tokens=pair.rejected_tokens[:-2])
        for pair in five_pairs
    ]
    monkeypatch.setattr(programs, "compile", None)
    trainer.train_until(3, make_loader(shorter, config), ignore)
    trainer.evaluate(PairSweep(shorter, batch_size=2, seq_len=16, pad_id=0, packing=packing))
    trainer.train_until(4, make_loader(five_pairs[1:], config), ignore)


def test_a_phase_that_resumes_after_its_last_evaluation_leaves_later_ones_the_same_shape(start, five_pairs, tmp_path):
    sweep = PairSweep(five_pairs, batch_size=2, seq_len=16, pad_id=0, packing=True)
    smaller = dataclasses.replace(sweep, pairs=five_pairs[:1])
    evaluated, resumed = start(packing=True), start(packing=True)
    evaluated.evaluate(sweep)
    Evaluator(resumed, sweep, NoTracker(), OutputFolder(str(tmp_path)), is_leader=False)
    assert smaller.shape != sweep.shape
    assert evaluated.in_run_shape(smaller).shape == resumed.in_run_shape(smaller).shape == sweep.shape


def test_of_all_longer_pairs_without_packing_only_the_first_compile_the_update_again(
    start, tiny_model, tiny_run, five_pairs, loader, make_loader, programs, one_device, monkeypatch
):
    shapes: list[RowShape] = []
    program = trainer_module.build_train_step(programs, tiny_model, tiny_run, one_device, loader.shape)
    monkeypatch.setattr(trainer_module, "build_train_step", lambda *given: shapes.append(given[-1]) or program)
    monkeypatch.setattr(Trainer, "_advance", lambda self, batch, program: {})
    trainer = start()
    for stop, length in enumerate((1, 7, 10, 3), 1):
        pairs = [dataclasses.replace(pair, chosen_tokens=np.full(6 + length, 7, np.int32)) for pair in five_pairs]
        trainer.train_until(stop, make_loader(pairs, tiny_run), ignore)
    # A program is compiled for each shape. The second fits every batch: 4 sequences of 16 tokens without the first.
    assert len(set(shapes)) == 2
    assert shapes[1].num_predictions >= 4 * 15


def test_a_mixture_with_other_weights_counts_as_other_pairs_unless_their_ratio_is_the_same(five_pairs, loader):
    def digest(*weights: float) -> str:
        return dataclasses.replace(loader, mixture=Mixture((2, 3), weights)).data_digest

    assert digest(1.0, 2.0) == digest(2.0, 4.0) != digest(2.0, 1.0)
    assert dataclasses.replace(loader, mixture=Mixture((5,), (3.0,))).data_digest == loader.data_digest
    shorter = dataclasses.replace(five_pairs[0], chosen_response_start=five_pairs[0].chosen_response_start + 1)
    for pairs in (five_pairs[::-1], five_pairs[:4], [shorter, *five_pairs[1:]]):
        assert dataclasses.replace(loader, pairs=pairs).data_digest != loader.data_digest


def test_a_replay_from_the_start_reproduces_every_digest(start, loader):
    def digests() -> list[str]:
        trainer = start()
        found = [trainer.digest()]
        trainer.train_until(3, loader, lambda step, metrics: found.append(trainer.digest()))
        return found

    first = digests()
    assert digests() == first
    assert len(set(first)) == 4


def test_another_seed_starts_from_other_weights(start):
    assert start(seed=1).digest() != start(seed=2).digest()


def test_the_loss_falls_on_pairs_that_can_be_memorised(start, tiny_run, five_pairs, make_loader):
    trainer = start(num_train_steps=40, optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0))
    loader = make_loader(five_pairs, dataclasses.replace(tiny_run, num_train_steps=40))
    losses: list[float] = []
    accuracies: list[float] = []

    def record(step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        accuracies.append(metrics["rewards/accuracies"])

    trainer.train_until(40, loader, record)
    assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])
    assert np.mean(accuracies[-5:]) == 1.0


def test_every_update_reports_host_values_under_its_own_step(start, loader, tiny_run):
    trainer = start()
    seen: dict[int, dict[str, float]] = {}
    trainer.train_until(2, loader, lambda step, metrics: seen.update({step: metrics}))
    trainer.train_until(4, loader, lambda step, metrics: seen.update({step: metrics}))
    assert list(seen) == [1, 2, 3, 4]
    for step, metrics in seen.items():
        assert metrics.keys() >= {"loss", "rewards/margins", "logps/chosen", "grad_norm", "step_seconds"}
        assert {type(value) for value in metrics.values()} == {float}
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["learning_rate"] == learning_rate_at(tiny_run.optimizer, 7, step - 1)
        assert metrics["tokens"] == loader.batch(step - 1).num_tokens
        assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["step_seconds"])


def test_packed_rows_train_like_padded_rows(start, tiny_run, five_pairs, make_loader):
    def train(**changes) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = []
        config = dataclasses.replace(tiny_run, **changes)
        start(**changes).train_until(7, make_loader(five_pairs, config), lambda step, metrics: rows.append(metrics))
        return rows

    padded, packed = train(), train(packing=True, train_batch_size=2)
    for one, other in zip(padded, packed, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "tokens"):
            assert other[name] == pytest.approx(one[name], rel=2e-4), name
    assert all(0 < row["padding_share"] < 1 for row in (*padded, *packed))


def test_the_moving_average_follows_the_weights(start, tiny_run, five_pairs, make_loader):
    trainer = start(**AVERAGED)
    loader = make_loader(five_pairs, dataclasses.replace(tiny_run, **AVERAGED))
    weights = [np.asarray(trainer.params.embedding.array)]
    trainer.train_until(2, loader, lambda step, metrics: weights.append(np.asarray(trainer.params.embedding.array)))
    assert trainer.state.ema is not None
    expected = 0.9 * (0.9 * weights[0] + 0.1 * weights[1]) + 0.1 * weights[2]
    np.testing.assert_allclose(trainer.state.ema.embedding.array, expected, rtol=1e-6, atol=1e-7)
    assert start().state.ema is None


@pytest.mark.parametrize(
    ("packing", "simpo"), [(False, SimpoConfig(sft_weight=0.7, z_loss_weight=0.1)), (True, SimpoConfig())]
)
def test_an_evaluation_is_the_mean_over_all_pairs_and_changes_nothing(
    packing, simpo, start, tiny_run, five_pairs, make_loader
):
    trainer = start(packing=packing, simpo=simpo)
    before = trainer.digest()
    sweep = PairSweep(five_pairs, batch_size=2, seq_len=16, pad_id=0, packing=packing)
    evaluation = trainer.evaluate(sweep)
    assert trainer.digest() == before
    # The first update of a run over all five pairs at once computes the same values before it changes the weights.
    whole = start(packing=packing, simpo=simpo, train_batch_size=5)
    config = dataclasses.replace(tiny_run, packing=packing, simpo=simpo, train_batch_size=5)
    rows: list[dict[str, float]] = []
    whole.train_until(1, make_loader(five_pairs, config), lambda step, metrics: rows.append(metrics))
    found = evaluation.metrics
    assert found == pytest.approx({name: rows[0][name] for name in found}, rel=1e-5)
    assert set(found) >= {"loss", "rewards/accuracies", "rewards/margins"}
    assert np.mean(evaluation.margins) * simpo.beta == pytest.approx(found["rewards/margins"], rel=1e-5)
    assert np.mean(np.array(evaluation.margins) > 0) == pytest.approx(found["rewards/accuracies"])
    backwards = trainer.evaluate(dataclasses.replace(sweep, pairs=five_pairs[::-1]))
    assert backwards.margins == pytest.approx(evaluation.margins[::-1], rel=1e-5)


def test_training_to_the_update_already_reached_does_nothing(start, loader):
    trainer = start()
    trainer.train_until(1, loader, ignore)
    before = trainer.digest()
    trainer.train_until(1, loader, lambda step, metrics: pytest.fail("no update should run"))
    assert trainer.digest() == before


@pytest.mark.parametrize(("stop", "message"), [(1, r"train_until\(1\): 2 updates are finished"), (8, "from 2 to 7")])
def test_going_back_or_beyond_the_run_is_refused_and_changes_nothing(stop, message, start, loader):
    trainer = start()
    trainer.train_until(2, loader, ignore)
    before = trainer.digest()
    with pytest.raises(ConfigError, match=message):
        trainer.train_until(stop, loader, ignore)
    assert trainer.digest() == before


@pytest.mark.parametrize("changes", [{"train_batch_size": 3}, {"train_seq_len": 32}, {"packing": True}])
def test_a_loader_of_another_shape_is_refused(changes, start, tiny_run, five_pairs, make_loader):
    other = make_loader(five_pairs, dataclasses.replace(tiny_run, **changes))
    with pytest.raises(ConfigError, match=r"this run has 2 pairs of 16 with .*Build the loader"):
        start().train_until(1, other, ignore)


def test_a_loader_for_another_run_length_is_refused(start, tiny_run, five_pairs, make_loader):
    other = make_loader(five_pairs, dataclasses.replace(tiny_run, num_train_steps=8))
    with pytest.raises(ConfigError, match="the loader serves 8 updates, but the run has 7"):
        start().train_until(1, other, ignore)


def test_sequences_longer_than_the_model_are_refused_before_compiling(start, programs, monkeypatch):
    monkeypatch.setattr(programs, "compile", None)
    with pytest.raises(
        ConfigError, match="train_seq_len is 65, but the model's max_seq_len is 64; lower train_seq_len"
    ):
        start(train_seq_len=65)


def test_tokens_beyond_the_vocabulary_are_refused_before_compiling(
    start, tiny_run, five_pairs, make_loader, programs, monkeypatch
):
    trainer = start()
    before = trainer.digest()
    monkeypatch.setattr(programs, "compile", None)
    with pytest.raises(DataError, match="the padding token is 40, but the model knows tokens 0 to 39"):
        trainer.train_until(1, make_loader(five_pairs, tiny_run, pad_id=40), ignore)
    beyond = dataclasses.replace(five_pairs[3], rejected_tokens=five_pairs[3].rejected_tokens + 40)
    with pytest.raises(DataError, match=f"{beyond.prompt_id}' contains token .*, but the model knows tokens 0 to 39"):
        trainer.train_until(1, make_loader([*five_pairs[:3], beyond], tiny_run), ignore)
    assert trainer.digest() == before


def test_a_loss_that_is_not_finite_stops_the_run_naming_update_and_pairs(start, loader):
    trainer = start(optimizer=OptimizerConfig(learning_rate=1e30, warmup=0.0))
    trainer.train_until(1, loader, ignore)
    leaves = jax.tree.leaves(trainer.state)
    ids = [loader.pairs[index].prompt_id for index in loader.indices(1)]
    with pytest.raises(TrainingError, match=rf"update 2 gave .*nan.*'{ids[0]}', '{ids[1]}'"):
        trainer.train_until(3, loader, ignore)
    assert all(leaf.is_deleted() for leaf in leaves)
    with pytest.raises(TrainingError, match=r"has no state: update 2 was not finite\. Restart the run"):
        trainer.digest()


def test_an_update_that_fails_leaves_no_state_in_use(start, loader):
    trainer = start()
    trainer.train_until(1, loader, ignore)
    trainer.params.embedding.array.delete()  # what a borrower must not do
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        trainer.train_until(2, loader, ignore)
    with pytest.raises(TrainingError, match="has no state: update 2 failed"):
        trainer.train_until(2, loader, ignore)


def test_after_a_failing_listener_training_resumes_from_the_finished_update(start, loader):
    whole, interrupted = start(), start()
    whole.train_until(3, loader, ignore)

    def fail_at_two(step: int, metrics: dict[str, float]) -> None:
        if step == 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        interrupted.train_until(3, loader, fail_at_two)
    assert interrupted.step == 2
    interrupted.train_until(3, loader, ignore)
    assert interrupted.digest() == whole.digest()


def test_freeing_deletes_the_buffers_and_ends_the_trainer(start, loader):
    trainer = start()
    trainer.train_until(1, loader, ignore)
    leaves = jax.tree.leaves(trainer.state)
    trainer.free()
    trainer.free()
    assert all(leaf.is_deleted() for leaf in leaves)
    with pytest.raises(TrainingError, match="it was freed after update 1"):
        trainer.train_until(2, loader, ignore)


def test_the_abstract_parameters_describe_the_real_ones(start):
    trainer = start()
    described = zip(jax.tree.leaves(trainer.abstract_params), jax.tree.leaves(trainer.params), strict=True)
    for abstract, leaf in described:
        assert (abstract.shape, abstract.dtype, abstract.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
