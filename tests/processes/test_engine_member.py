"""A member's rounds, in this process: repeatable, undoable, and told apart from any other work."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from engine_pieces import SEQUENCE, Setting, make_setting
from sklearn.datasets import load_digits

from shoal.errors import ShoalError
from shoal.protocol.training import SKETCH_WIDTH, Codec, OptimizerSettings, Outer, RoundSettings, Schedule
from shoal.training.commands import ApplyCommit, CommittedUpdate, Evaluate, RoundDone, RunRound
from shoal.training.compute import NoDevice
from shoal.training.engine import LanguageEngine, NotALanguageModel
from shoal.training.member import SUMMED_AT_ONCE, FlatParameters, Member, OutOfTurn, Sketcher
from shoal.training.member_engine import WrongState
from shoal.training.optimizer import BadOptimizer, FlatAdamW, TorchOptimizer
from shoal.training.outer import OuterStep, WeighedUpdate
from shoal.training.private import PrivateState
from shoal.training.schedule import batch_sizes, learning_rate, round_rates
from shoal.training.state import BadState, SharedState
from shoal.training.updates import decode_update
from shoal.verification.replay import Thresholds, compare_sketches
from shoal.world import SystemClock


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("engine"), residual_ahead=0.2, outer_learning_rate=1.4)


def open_engine(setting: Setting, **changes: object) -> LanguageEngine:
    return LanguageEngine(setting.prepare(**changes), SystemClock())


def one_round(engine: LanguageEngine, command: RunRound) -> RoundDone:
    return asyncio.run(engine.run_round(command))


def sole_commit(number: int, previous: bytes, update: str) -> ApplyCommit:
    return ApplyCommit(round=number, previous=previous, accepted=(CommittedUpdate(update, 1_000_000, 1_000_000),))


def some_rounds(engine: LanguageEngine, setting: Setting, count: int) -> list[tuple[RunRound, RoundDone, bytes]]:
    """Rounds of a job with one member and lag 1 -> (command, result, shared state after it)."""
    states, done = [setting.start.hash], []
    for number in range(count):
        command = setting.run_round(
            number,
            states[max(0, number - 1)],
            in_flight=done[-1][0].update if done else None,
            rounds_in_flight=min(number, 1),
        )
        result = one_round(engine, command)
        state = engine.apply_commit(sole_commit(number, states[-1], command.update)).state
        states.append(state)
        done.append((command, result, state))
    return done


def test_the_same_engine_repeats_every_round_bit_for_bit_from_its_private_state(setting: Setting) -> None:
    engine = open_engine(setting)
    private = setting.folder / "private-2"
    first = some_rounds(engine, setting, 2)
    engine.write_private(str(private))
    middle = PrivateState.read(private)
    assert middle.hash == first[-1][1].private_after

    whole = some_rounds(open_engine(setting), setting, 4)
    assert [result.update_hash for _, result, _ in whole[:2]] == [result.update_hash for _, result, _ in first]
    assert all(later[1].private_before == earlier[1].private_after for earlier, later in pairwise(whole))

    replay = open_engine(setting)
    previous = setting.start.hash
    for command, _, state in whole[:2]:
        assert replay.apply_commit(sole_commit(command.round, previous, command.update)).state == state
        previous = state
    replay.load_private(str(private))
    for command, result, _ in whole[2:]:
        again = one_round(replay, command)
        assert msgspec.structs.replace(again, compute_ms=0) == msgspec.structs.replace(result, compute_ms=0)


def test_training_lowers_the_loss(setting: Setting) -> None:
    engine = open_engine(setting)
    before = engine.evaluate(Evaluate(state=setting.start.hash, shards=setting.data.held_out))
    rounds = some_rounds(engine, setting, 8)
    after = engine.evaluate(Evaluate(state=rounds[-1][2], shards=setting.data.held_out))
    assert before.tokens == after.tokens == sum(shard.sequences for shard in setting.data.held_out) * SEQUENCE
    assert before.loss == pytest.approx(np.log(257), rel=0.05)
    assert after.loss < before.loss - 1.0


def test_a_round_says_what_it_did(setting: Setting) -> None:
    engine = open_engine(setting)
    command = setting.run_round(0, setting.start.hash, samples=22, snapshot=str(setting.folder / "kept"))
    result = one_round(engine, command)
    assert (result.samples, result.tokens) == (22, 22 * SEQUENCE)
    assert len(result.losses) == len(batch_sizes(22, 4)) == 6
    assert (result.loss_first, result.loss_last) == (result.losses[0], result.losses[-1])
    sketches = np.frombuffer(result.sketches, dtype="<f4").reshape(-1, 1 + SKETCH_WIDTH)
    assert sketches[:, 0].tolist() == [np.float32(loss) for loss in result.losses]
    assert (np.abs(sketches[:, 1:]) > 0).all()
    assert result.update_bytes == Path(command.update).stat().st_size
    assert PrivateState.read(setting.folder / "kept").hash == result.private_after
    assert result.snapshot_bytes == (setting.folder / "kept").stat().st_size
    assert result.private_before == PrivateState.fresh(2 * setting.start.layout.size, setting.start.layout.size).hash


def test_the_update_and_the_residual_add_up_to_what_was_learned(setting: Setting) -> None:
    """e after + sent = decay * e before + (start - end), for a round that starts from the base alone."""
    engine = open_engine(setting)
    command = setting.run_round(0, setting.start.hash)
    one_round(engine, command)
    end = engine.parameters.numbers().copy()
    sent = decode_update(Path(command.update).read_bytes(), Codec.SPARSE2, setting.start.layout.size).dense()
    assert np.allclose(engine.member.private.residual + sent, setting.start.parameters - end, atol=1e-7)


# --- undoing -------------------------------------------------------------------------------------------------------


def test_an_excluded_contribution_leaves_no_trace(setting: Setting) -> None:
    """Rounds 0, 1, 2 with round 1 undone while round 2 was already done on top of it: what follows is as if the member
    had slept through both."""
    spoiled, slept = open_engine(setting), open_engine(setting)
    done = some_rounds(spoiled, setting, 1)
    some_rounds(slept, setting, 1)
    state = done[0][2]
    kept = done[0][1].private_after
    in_flight = None
    for number in (1, 2):
        command = setting.run_round(number, state, in_flight=in_flight)
        one_round(spoiled, command)
        in_flight = command.update
    spoiled.roll_back(kept)
    later = setting.run_round(3, state)
    assert _same(one_round(spoiled, later), one_round(slept, later))


def test_a_cancelled_round_leaves_no_trace(setting: Setting) -> None:
    disturbed, calm = open_engine(setting), open_engine(setting)

    async def cancel_after_two_steps() -> None:
        task = asyncio.create_task(disturbed.run_round(setting.run_round(0, setting.start.hash)))
        while len(disturbed.member._losses) < 2:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_after_two_steps())
    assert not disturbed.member.computing
    command = setting.run_round(1, setting.start.hash)
    assert _same(one_round(disturbed, command), one_round(calm, command))


def test_a_commit_applied_between_steps_does_not_touch_the_running_round(setting: Setting) -> None:
    busy, calm = open_engine(setting), open_engine(setting)
    (command, _, state), *_ = some_rounds(busy, setting, 1)
    some_rounds(calm, setting, 1)
    following = setting.run_round(1, setting.start.hash, in_flight=command.update)

    async def with_commits_between() -> RoundDone:
        task = asyncio.create_task(busy.run_round(following))
        while not task.done():
            busy.apply_commit(sole_commit(0, setting.start.hash, command.update))
            await asyncio.sleep(0)
        return await task

    assert _same(asyncio.run(with_commits_between()), one_round(calm, following))
    assert busy.state(state).hash == state


def test_measuring_leaves_no_trace(setting: Setting) -> None:
    measured, plain = open_engine(setting), open_engine(setting)
    prepared = asyncio.run(measured.prepared(True))
    assert prepared.samples_per_s > 0
    command = setting.run_round(0, setting.start.hash)
    assert _same(one_round(measured, command), one_round(plain, command))


def test_what_is_out_of_turn_or_unknown_is_refused_in_a_sentence(setting: Setting) -> None:
    engine = open_engine(setting)
    command = setting.run_round(0, setting.start.hash)
    with pytest.raises(WrongState, match="is not among the 1 held"):
        one_round(engine, msgspec.structs.replace(command, base_state=bytes(32)))
    with pytest.raises(OutOfTurn, match="not among the 1 that are kept"):
        engine.roll_back(bytes(32))
    one_round(engine, command)
    with pytest.raises(WrongState, match=r"Commit 0 names shared state 0000.*this node stops"):
        wrong = msgspec.structs.replace(sole_commit(0, setting.start.hash, command.update), state=bytes(32))
        engine.apply_commit(wrong)
    assert list(engine._states) == [setting.start.hash]
    Path(command.update).write_bytes(Path(command.update).read_bytes()[:-1])
    with pytest.raises(ShoalError, match="was refused"):
        engine.apply_commit(sole_commit(0, setting.start.hash, command.update))

    other = make_setting(
        setting.folder / "wide", config=setting.job.model.config.replace('"hidden_size":32', '"hidden_size":64')
    )
    with pytest.raises(WrongState, match="does not have the tensors"):
        engine.load_state(str(other.folder / "start"))
    private = setting.folder / "broken"
    private.write_bytes(engine.member.private._parts()[0])
    with pytest.raises(BadState, match="holds 0 bytes of tensors"):
        engine.load_private(str(private))


def test_a_job_or_device_that_is_not_for_this_engine_is_refused(setting: Setting) -> None:
    model = msgspec.structs.replace(setting.job.model, config="")
    with pytest.raises(NotALanguageModel, match="its loop is its owner's own code"):
        open_engine(setting, job=msgspec.structs.replace(setting.job, model=model))
    with pytest.raises(NoDevice, match="Device 'nonsense' cannot be used"):
        open_engine(setting, device="nonsense")
    with pytest.raises(ShoalError, match="the job says"):
        data = msgspec.structs.replace(setting.job.data, samples=setting.job.data.samples + 1)
        open_engine(setting, job=msgspec.structs.replace(setting.job, data=data))


def test_diverged_training_is_a_sentence_and_the_member_is_as_before(setting: Setting) -> None:
    job = msgspec.structs.replace(
        setting.job,
        optimizer=OptimizerSettings(learning_rate=10.0, warmup_steps=0, gradient_clip=0.0, beta1=0.0, beta2=0.0),
    )
    engine = open_engine(setting, job=job)
    before = engine.member.private.hash
    engine.parameters.flat.data.fill_(float("nan"))
    start = np.full(setting.start.layout.size, np.nan, dtype=np.float32)
    with pytest.raises(ShoalError, match="diverged; lower the learning rate"):
        engine._states[setting.start.hash] = SharedState(setting.start.layout, start)
        one_round(engine, setting.run_round(0, setting.start.hash))
    assert engine.member.private.hash == before and not engine.member.computing


def _same(left: RoundDone, right: RoundDone) -> bool:
    return msgspec.structs.replace(left, compute_ms=0) == msgspec.structs.replace(right, compute_ms=0)


# --- telling honest work from other work ---------------------------------------------------------------------------


def test_one_altered_step_or_sample_stands_far_out_from_honest_rounding(setting: Setting) -> None:
    """Rounding differences of another engine are stood in for by start states that differ in their last bits; the
    thresholds lie between them and the smallest alteration, far from both."""
    thresholds = Thresholds()
    engine = open_engine(setting)
    size = setting.start.layout.size
    rounds = some_rounds(engine, setting, 3)
    private = {}
    for number in (1, 2):
        engine.load_private(None)
        for command, _, _ in rounds[:number]:
            one_round(engine, msgspec.structs.replace(command, update=str(setting.folder / "redone")))
        private[number] = setting.folder / f"private-before-{number}"
        engine.write_private(str(private[number]))
    compute = type(engine)._step

    def redo(number: int, alter: str, step: int) -> tuple[float, float]:
        """-> worst sketch difference, update distance."""
        command, claimed, _ = rounds[number]
        engine.load_private(str(private[number]))
        base = engine._states[command.base_state]
        count = 0

        def altered(batch: np.ndarray, batch_size: int, rate: float) -> None:  # type: ignore[type-arg]
            nonlocal count
            count += 1
            if count - 1 == step and alter == "skip":
                engine.member.stepped(engine._shared(batch, batch_size))
                return
            if count - 1 == step and alter == "rate":
                rate *= 0.9
            if count - 1 == step and alter == "sample":
                batch = np.concatenate([batch[:-1], (batch[-1:] + 100) % setting.job.data.samples])
            compute(engine, batch, batch_size, rate)

        engine._step = altered  # type: ignore[method-assign]
        if alter == "rounding":
            nudged = np.nextafter(base.parameters, np.float32(1))
            engine._states[command.base_state] = SharedState(base.layout, nudged)
        result = one_round(engine, msgspec.structs.replace(command, update=str(setting.folder / "redone")))
        engine._states[command.base_state] = base
        del engine._step
        difference = compare_sketches(claimed.sketches, result.sketches)
        assert difference is not None
        one = decode_update(Path(command.update).read_bytes(), Codec.SPARSE2, size).dense()
        other = decode_update((setting.folder / "redone").read_bytes(), Codec.SPARSE2, size).dense()
        return difference.worst, float(np.linalg.norm(one - other) / np.linalg.norm(other))

    for number in (1, 2):
        assert redo(number, "nothing", 0) == (0.0, 0.0)
        sketch, update = redo(number, "rounding", 0)
        assert 0 < sketch < thresholds.sketch / 10 and update < thresholds.update / 2
        for alter in ("skip", "rate", "sample"):
            for step in (0, 3, 5):
                sketch, _ = redo(number, alter, step)
                assert sketch > 3 * thresholds.sketch, (number, alter, step)


def test_long_rounds_are_sketched_at_intervals() -> None:
    flat = torch.nn.Parameter(torch.zeros(100))
    parameters = FlatParameters({"weight": flat})
    member = Member(parameters, _adamw(parameters), RoundSettings(codec=Codec.NONE), b"seed")
    member.begin(np.zeros(100, dtype=np.float32), 1300)
    for number in range(1300):
        parameters.flat.data.add_(0.001)
        member.stepped(float(number))
    result = member.finish()
    assert result.sketch_every == 3
    rows = np.frombuffer(result.sketches, dtype="<f4").reshape(-1, 1 + SKETCH_WIDTH)
    assert len(rows) == 434 <= 512
    assert rows[:4, 0].tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize("size", [1, 9, 1003, 3 * SUMMED_AT_ONCE + 5])
def test_a_sketch_is_the_signed_sum_of_the_movement_since_the_last(size: int) -> None:
    sketcher = Sketcher(size, b"seed", torch.device("cpu"))
    row = sketcher._row
    places = torch.arange(size)
    signs = sketcher._row_signs.flatten()[places // row] * sketcher._column_signs[places % row]
    assert set(signs.tolist()) == ({-1.0, 1.0} if size > 1 else {float(signs[0])})
    of_run = places // row // sketcher._row_signs.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator) * 0.03
    moved, again = (start + 1e-6 * torch.randn(size, generator=generator) for _ in range(2))
    sketcher.begin(start)
    for before, after in ((start, moved), (moved, again)):
        expected = torch.zeros(SKETCH_WIDTH, dtype=torch.float64)
        expected.index_add_(0, of_run, signs * (after.double() - before.double()))
        assert torch.allclose(sketcher.sketch(after).double(), expected, rtol=1e-5, atol=1e-12)


# --- pieces --------------------------------------------------------------------------------------------------------


def _adamw(parameters: FlatParameters) -> FlatAdamW:
    return FlatAdamW(parameters.flat, parameters.gradient, OptimizerSettings())


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("outer", list(Outer))
def test_every_codec_and_outer_step_trains(tmp_path: Path, codec: Codec, outer: Outer) -> None:
    momentum = 0.5 if outer is Outer.NESTEROV else 0.0
    setting = make_setting(tmp_path, codec=codec, outer=outer, outer_momentum=momentum, outer_learning_rate=0.7, lag=0)
    engine = open_engine(setting)
    state, losses = setting.start, []
    outer_step = OuterStep(setting.job.rounds)
    for number in range(4):
        command = setting.run_round(number, state.hash)
        losses.append(one_round(engine, command).loss_first)
        held = engine.apply_commit(sole_commit(number, state.hash, command.update))
        update = decode_update(Path(command.update).read_bytes(), codec, state.layout.size)
        state = outer_step.apply(state, [WeighedUpdate(update, 1_000_000)])  # as the driver does it
        assert state.hash == held.state
    assert losses[-1] < losses[0] - 0.15


def test_products_in_bfloat16_keep_state_and_optimizer_in_float32(setting: Setting) -> None:
    engine = open_engine(setting, dtype="bfloat16")
    command = setting.run_round(0, setting.start.hash, samples=4)
    result = one_round(engine, command)
    exact = one_round(open_engine(setting), command)
    assert result.loss_first == pytest.approx(exact.loss_first, rel=1e-2) and result.loss_first != exact.loss_first
    assert engine.member.private.optimizer.dtype == engine.member.private.residual.dtype == np.float32


def test_flat_adamw_is_torch_adamw_with_clipping() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Linear(13, 7)
    ours = torch.nn.Linear(13, 7)
    ours.load_state_dict(theirs.state_dict())
    parameters = FlatParameters(dict(ours.named_parameters()))
    settings = OptimizerSettings(gradient_clip=0.5)
    flat = FlatAdamW(parameters.flat, parameters.gradient, settings)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, weight_decay=0.1
    )
    for number in range(5):
        x = torch.randn(4, 13)
        for model in (ours, theirs):
            for parameter in model.parameters():
                assert parameter.grad is None or parameter.grad.zero_() is not None
            (model(x) ** 2).sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.gradient_clip)
        reference.param_groups[0]["lr"] = 0.01 * (number + 1)
        reference.step()
        flat.step(0.01 * (number + 1))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
    moments = flat.moments()
    flat.restore(np.zeros(0, dtype=np.float32), 0)
    assert not flat.moments().any()
    flat.restore(moments, 5)
    assert (flat.moments() == moments).all()
    with pytest.raises(BadOptimizer, match="keeps 196 numbers; 3 were given"):
        flat.restore(moments[:3], 5)


def test_batches_cover_a_share_evenly() -> None:
    for samples in (1, 7, 8, 9, 80, 83):
        sizes = batch_sizes(samples, 8)
        assert sum(sizes) == samples and len(sizes) == -(-samples // 8)
        assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1


def test_the_learning_rate_warms_up_by_steps_and_falls_with_the_tokens(setting: Setting) -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(settings, 9, 0.0) == 1.0
    assert learning_rate(settings, 100, 0.5) == pytest.approx(0.55)
    assert learning_rate(settings, 100, 1.0) == learning_rate(settings, 100, 7.0) == pytest.approx(0.1)
    constant = msgspec.structs.replace(settings, schedule=Schedule.CONSTANT)
    assert learning_rate(constant, 100, 0.9) == 1.0
    linear = msgspec.structs.replace(settings, schedule=Schedule.LINEAR, warmup_steps=0)
    assert learning_rate(linear, 0, 0.25) == pytest.approx(0.1 + 0.9 * 0.75)

    fast = round_rates(setting.job, step=6, tokens_done=640, rounds_in_flight=1, round_samples=40, steps=6)
    slow = round_rates(setting.job, step=6, tokens_done=640, rounds_in_flight=1, round_samples=40, steps=3)
    assert slow == fast[::2]
    following = round_rates(setting.job, step=12, tokens_done=640 + 1280, rounds_in_flight=1, round_samples=40, steps=6)
    assert all(later < earlier for earlier, later in zip(fast[1:], (fast + following)[2:], strict=False))


# --- a user's own loop ---------------------------------------------------------------------------------------------


def test_a_users_own_loop_uses_the_same_member_and_repeats_bit_for_bit() -> None:
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16, dtype=torch.float32)
    targets = torch.tensor(labels)

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, Member, FlatParameters]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        parameters = FlatParameters(dict(model.named_parameters()))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        member = Member(parameters, TorchOptimizer(optimizer), RoundSettings(lag=0), b"digits")
        return model, optimizer, member, parameters

    def their_round(
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        member: Member,
        start: np.ndarray,
        number: int,  # type: ignore[type-arg]
    ) -> tuple[bytes, bytes, tuple[float, ...]]:
        member.begin(start, 8)
        for step in range(8):
            batch = slice((number * 8 + step) * 16, (number * 8 + step + 1) * 16)
            optimizer.zero_grad(set_to_none=False)
            loss = torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            member.stepped(loss)
        result = member.finish()
        return result.update, result.after.hash, result.losses

    model, optimizer, member, parameters = make()
    state = SharedState.start(parameters.layout, parameters.numbers().copy(), momentum=False)
    outer = OuterStep(RoundSettings())
    states, shown = [state], []
    for number in range(10):
        shown.append(their_round(model, optimizer, member, member.start_state(state, None), number))
        update = decode_update(shown[-1][0], Codec.SPARSE2, state.layout.size)
        state = outer.apply(state, [WeighedUpdate(update, 1_000_000)])
        states.append(state)
        if number == 4:
            kept = member.private
    assert np.mean(shown[-1][2]) < 0.9 * np.mean(shown[0][2])

    model, optimizer, member, _ = make()  # in another process: a fresh optimizer without state
    member.load_private(kept)
    for number in range(5, 7):
        again = their_round(model, optimizer, member, member.start_state(states[number], None), number)
        assert again == shown[number]


def test_an_optimizer_that_keeps_something_else_is_refused() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with pytest.raises(BadOptimizer, match="Adam keeps 'exp_avg'"):
        TorchOptimizer(optimizer).moments()
