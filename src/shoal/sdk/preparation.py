"""From a job file to artifacts: token shards, a start state and a config, as blobs, before anyone is asked to help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.errors import BadInput
from shoal.models import configs
from shoal.models.initial import initial_parameters
from shoal.models.tokenizers import has_tokenizer, load_tokenizer
from shoal.protocol.training import DataRef, DataShard, ModelRef, Outer, RoundSettings
from shoal.sdk.jobfile import JobFile
from shoal.sdk.loop_script import OtherLoop, look_at
from shoal.storage import BlobStore
from shoal.training.commands import ShardFile
from shoal.training.data import PreparedData, prepare_data
from shoal.training.state import Layout, SharedState

SHARD_MEDIA_TYPE = "application/x-shoal-tokens"


class SequenceTooLong(BadInput):
    """Samples are longer than the model's context."""

    code = "SH-125"


@dataclass(frozen=True)
class Prepared:
    """What a TrainJob names, and what only its owner needs."""

    model: ModelRef
    data: DataRef
    state: SharedState
    tokenizer: str
    """`bytes`, or the path of a tokenizer file or directory."""
    held_out: tuple[ShardFile, ...]
    held_out_tokens: int
    unigram_loss: float | None
    """Nats per token; none for a loop of the owner's own."""
    script: str | None = None
    """The script of the owner's own loop."""
    samples_per_s: float = 0.0
    """Of the owner's own loop, as this machine does it; 0 where it was not tried."""
    untrained_loss: float | None = None
    """Held-out loss of the start state, as the owner's own loop measured it."""


def prepare(
    job: JobFile,
    rounds: RoundSettings,
    store: BlobStore,
    folder: Path,
    pin: str,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Read data and model, write shards and the start state into `store` (pinned as `pin`). Blocks, for as long as
    reading and tokenizing takes; `watch` is told every moment how many bytes of how many were read (0 of 0 while an
    owner's own loop is tried), and what it raises ends it. Raises BadData, BadModel, BadTokenizer, SequenceTooLong,
    ScriptFailed, StorageFull."""
    if job.model.script is not None:
        return _prepare_loop(job, Path(job.model.script), rounds, store, pin, watch)
    tokenizer = tokenizer_of(job)
    words = load_tokenizer(tokenizer)
    checkpoint, preset = None, job.model.preset or "tiny"
    if job.model.checkpoint is not None:
        from shoal.models.checkpoints import read_checkpoint  # torch takes seconds to load

        checkpoint = read_checkpoint(Path(job.model.checkpoint))
        config = checkpoint.config
    elif job.model.config is not None:
        config = configs.read_config(Path(job.model.config))
    else:
        config = configs.preset_config(preset, words.vocabulary, words.end)
    if configs.vocabulary_of(config) < words.vocabulary:
        raise SequenceTooLong(
            f"The tokenizer has {words.vocabulary} ids, the model knows {configs.vocabulary_of(config)}; "
            "choose a tokenizer that belongs to the model."
        )
    positions = configs.positions_of(config)
    if positions is not None and job.data.sequence_tokens > positions:
        raise SequenceTooLong(
            f"data.sequence_tokens is {job.data.sequence_tokens}, the model reads at most {positions}; make it smaller."
        )
    data = prepare_data(
        job.data.paths,
        folder,
        tokenizer=tokenizer,
        sequence_tokens=job.data.sequence_tokens,
        held_out_fraction=job.data.held_out,
        seed=job.seed,
        text_field=job.data.text_field,
        file_format=job.data.format,
        watch=watch,
    )
    if checkpoint is not None:
        tensors = checkpoint.tensors
    elif job.model.config is not None:
        from shoal.models.architectures import build_model, parameters_of

        named = parameters_of(build_model(config, seed=job.seed))
        tensors = {name: parameter.detach().numpy() for name, parameter in named.items()}
    else:
        tensors = initial_parameters(preset, words.vocabulary, seed=job.seed)
    layout = Layout.of({name: tensor.shape for name, tensor in tensors.items()})
    flat = np.concatenate([tensors[tensor.name].ravel() for tensor in layout.tensors]).astype(np.float32)
    state = SharedState.start(layout, flat, momentum=rounds.outer is Outer.NESTEROV)
    start = store.put(state.to_bytes(), SharedState.MEDIA_TYPE)
    store.pin(pin, start.hash)
    return Prepared(
        model=ModelRef(config=config, start=start, parameters=layout.size),
        data=_data_ref(data, store, pin),
        state=state,
        tokenizer=tokenizer,
        held_out=data.held_out,
        held_out_tokens=data.held_out_tokens,
        unigram_loss=data.unigram_loss,
    )


def _prepare_loop(
    job: JobFile, path: Path, rounds: RoundSettings, store: BlobStore, pin: str, watch: Callable[[int, int], None]
) -> Prepared:
    """A loop of the owner's own: its script says what it starts from."""
    script = look_at(path, batch_samples=job.batch_samples, watch=lambda: watch(0, 0))
    if script.looked.job != job.name:
        raise OtherLoop(
            f"{path} joins job {script.looked.job!r}, the job file is of {job.name!r}; let them be the same."
        )
    start = script.start
    state = SharedState.start(start.layout, start.parameters, momentum=rounds.outer is Outer.NESTEROV)
    ref = store.put(state.to_bytes(), SharedState.MEDIA_TYPE)
    store.pin(pin, ref.hash)
    return Prepared(
        model=ModelRef(start=ref, parameters=state.layout.size),
        data=DataRef(samples=script.looked.samples),
        state=state,
        tokenizer="",
        held_out=(),
        held_out_tokens=0,
        unigram_loss=None,
        script=str(path),
        samples_per_s=script.looked.samples_per_s,
        untrained_loss=script.looked.held_out_loss,
    )


def tokenizer_of(job: JobFile) -> str:
    """What `model.tokenizer: auto` means: the checkpoint's own tokenizer where it has one, else bytes."""
    if job.model.tokenizer != "auto":
        return job.model.tokenizer
    if job.model.checkpoint is not None and has_tokenizer(Path(job.model.checkpoint)):
        return job.model.checkpoint
    return "bytes"


def _data_ref(data: PreparedData, store: BlobStore, pin: str) -> DataRef:
    shards = []
    for shard in data.train:
        ref = store.adopt(Path(shard.path), SHARD_MEDIA_TYPE)
        store.pin(pin, ref.hash)
        shards.append(DataShard(ref, shard.sequences))
    return DataRef(
        samples=data.samples,
        sequence_tokens=data.sequence_tokens,
        token_bytes=data.token_bytes,
        shards=tuple(shards),
        vocabulary=data.vocabulary,
    )
