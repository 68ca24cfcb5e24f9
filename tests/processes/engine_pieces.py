"""Pieces for tests of the engine: a small model, a little text, and the job that trains one on the other."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from shoal.identity import blake3_hash
from shoal.models.architectures import build_model, parameters_of
from shoal.models.configs import canonical_config, preset_config
from shoal.protocol.blobs import BlobRef
from shoal.protocol.training import (
    DataRef,
    DataShard,
    ModelRef,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
    SampleRange,
    TrainJob,
)
from shoal.training.commands import Prepare, RunRound
from shoal.training.data import PreparedData, prepare_data
from shoal.training.member import FlatParameters
from shoal.training.state import SharedState

WORDS = ("shoal", "fish", "turn", "tide", "moves", "as", "one", "when", "the", "light", "falls", "many", "small")
SEQUENCE = 32
MEMBER = bytes(32)


def some_text(words: int, seed: int = 0) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) + ("\n" if dice.random() < 0.1 else "") for _ in range(words))


def small_config() -> str:
    """A Llama of 31 thousand parameters over bytes."""
    fields = msgspec.json.decode(preset_config("tiny", 257, 256))
    fields |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 2}
    return canonical_config(fields, "the small config")


@dataclass(frozen=True)
class Setting:
    """A job with its files."""

    job: TrainJob
    start: SharedState
    data: PreparedData
    folder: Path

    def prepare(self, **changes: object) -> Prepare:
        command = Prepare(job=self.job, state=str(self.folder / "start"), shards=self.data.train, measure=False)
        return msgspec.structs.replace(command, **changes)

    def run_round(self, number: int, base: bytes, *, samples: int = 24, **changes: object) -> RunRound:
        """Round `number` over the next `samples` positions."""
        command = RunRound(
            round=number,
            base_state=base,
            step=number * self.job.rounds.inner_steps,
            tokens_done=number * samples * SEQUENCE,
            round_samples=samples,
            member=MEMBER,
            ranges=(SampleRange(0, number * samples, (number + 1) * samples),),
            update=str(self.folder / f"update-{number}"),
        )
        return msgspec.structs.replace(command, **changes)


def with_shards(setting: Setting) -> tuple[Setting, dict[bytes, Path]]:
    """The same, with the token files named as blobs: their hashes and files."""
    files = {blake3_hash(Path(shard.path).read_bytes()): shard for shard in setting.data.train}
    shards = tuple(
        DataShard(BlobRef(name, Path(shard.path).stat().st_size), shard.sequences) for name, shard in files.items()
    )
    job = msgspec.structs.replace(setting.job, data=msgspec.structs.replace(setting.job.data, shards=shards))
    return replace(setting, job=job), {name: Path(shard.path) for name, shard in files.items()}


def make_setting(folder: Path, *, config: str | None = None, batch_samples: int = 4, **rounds: object) -> Setting:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(some_text(12_000))
    data = prepare_data([folder / "text.txt"], folder / "data", sequence_tokens=SEQUENCE, held_out_fraction=0.1)
    config = config or small_config()
    parameters = FlatParameters(parameters_of(build_model(config, seed=7)))
    settings = RoundSettings(inner_steps=6, **rounds)  # type: ignore[arg-type]
    start = SharedState.start(
        parameters.layout, parameters.numbers().copy(), momentum=settings.outer.value == "nesterov"
    )
    start.write(folder / "start")
    job = TrainJob(
        name="test",
        created_ms=0,
        seed=11,
        model=ModelRef(config=config, start=BlobRef(start.hash, start.size), parameters=start.layout.size),
        data=DataRef(samples=data.samples, sequence_tokens=SEQUENCE, token_bytes=data.token_bytes, vocabulary=257),
        token_budget=100_000,
        batch_samples=batch_samples,
        optimizer=OptimizerSettings(learning_rate=4e-3, warmup_steps=5),
        rounds=settings,
        replay=ReplaySettings(),
    )
    return Setting(job, start, data, folder)
