"""The job file: what a user writes to have a model trained.

    data:
      paths: [my-notes.txt]

is a whole one. Every other field has a default; `explain` lists them all, `json_schema` tells them to an editor. The
settings of optimizer, rounds and replay are those of the protocol (`shoal.protocol.training`), under the same names.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shoal.market.requirements import ALTERNATIVES_MAX, Milliseconds, Needed, Requirements, Wish
from shoal.models.configs import PRESETS
from shoal.protocol.offers import Name
from shoal.protocol.training import (
    MEMBERS_MAX,
    STEPS_MAX,
    OptimizerSettings,
    ReplaySettings,
    RoundSettings,
)
from shoal.quantities.money import AMOUNT_MAX
from shoal.sdk import documents
from shoal.sdk.documents import DOCUMENT_MAX_BYTES, LIST_MAX, BadDocument, BadValue, Document

PathText = Annotated[str, Meta(min_length=1, max_length=4096)]


class ContradictoryJob(BadValue):
    """Two fields of a job file exclude each other."""

    code = "SH-123"


class MissingPath(BadValue):
    """A path in a job file leads nowhere, or to an empty file."""

    code = "SH-124"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the job file."""


class ModelSection(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained. At most one of preset, config, checkpoint and script; without any, the preset `tiny`."""

    preset: str | None = None
    """A shape by name: tiny (0.9 M parameters, for first steps), small (10 M) or gpt2-small (124 M)."""
    config: PathText | None = None
    """A `transformers` config.json, or a directory with one; weights start at random."""
    checkpoint: PathText | None = None
    """A directory with config.json and safetensors weights to go on from."""
    script: PathText | None = None
    """A Python script with a PyTorch loop of one's own that calls `shoal.join`. Its processes, which one starts
    oneself, are the job's nodes; it has its own data, and a sample counts as a token."""
    tokenizer: PathText = "auto"
    """`bytes`, or a tokenizer.json or a directory with one, or with a vocabulary and merges. `auto` takes the
    checkpoint's own, and bytes without it."""


class DataSection(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it is trained on; a script has data of its own."""

    paths: Annotated[tuple[PathText, ...], Meta(max_length=LIST_MAX)] = ()
    """Files, directories or patterns such as `books/*.txt`; relative ones start at the job file's directory. Needed
    unless there is a script."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """What the files are; auto goes by their endings, and takes what it does not know for text."""
    text_field: Annotated[str, Meta(min_length=1, max_length=256)] = "text"
    """The field or column of jsonl and parquet files that holds the text."""
    held_out: Annotated[float, Meta(gt=0, le=0.5)] = 0.02
    """Share of the documents kept back to measure the model on."""
    sequence_tokens: Annotated[int, Meta(ge=2, le=1 << 20)] = 128
    """Tokens in one training sample."""


class RoundsSection(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How members exchange what they learned."""

    inner_steps: Annotated[int, Meta(ge=1, le=STEPS_MAX)] | Literal["auto"] = "auto"
    """Steps that a member of speed 1 (the fastest) does between exchanges; auto chooses from the measured links and
    the byte budget, and says why."""
    byte_budget: Annotated[float, Meta(ge=1, le=1e12, extra={"quantity": "bytes_per_s"})] | None = None
    """What a member may send per second on average; without it, what its link carries."""
    bytes_per_token: Annotated[float, Meta(ge=1e-6, le=1e9)] | None = None
    """What all members together may send for each token trained on, start-up apart. Data-parallel training of a model
    of N parameters sends some 8 N bytes a step and member. Members that measured nearly alike are taken as equal, so up
    to a fifth more may be sent."""
    settings: Annotated[RoundSettings, Meta(extra={"flat": True})] = RoundSettings()

    def resolved(self, chosen_steps: int) -> RoundSettings:
        """The settings with `inner_steps` as the file says, or as it was chosen where the file says auto."""
        steps = chosen_steps if self.inner_steps == "auto" else self.inner_steps
        return msgspec.structs.replace(self.settings, inner_steps=steps)


class RequirementsSection(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which nodes the job takes."""

    nodes_min: Annotated[int, Meta(ge=1, le=MEMBERS_MAX)] = 1
    """The job starts when so many are ready."""
    nodes_max: Annotated[int, Meta(ge=1, le=MEMBERS_MAX)] = 64
    """No more than this many at a time."""
    flops_together: Annotated[float, Meta(ge=0, le=1e18, extra={"quantity": "count"})] = 0.0
    """And when they were measured at so many FLOP/s together, each in its fastest dtype: any mix that gives it. With a
    budget the cheapest such mix is taken."""
    wait_s: Annotated[float, Meta(ge=0, le=7 * 86_400)] = 60.0
    """How long to wait for so many nodes before giving up."""
    latency_within_ms: Milliseconds | None = None
    """There and back between any two of its nodes at most, as they measure it themselves."""
    bond_min: Annotated[int, Meta(ge=0, le=AMOUNT_MAX, extra={"quantity": "money"})] = 0
    """What has to be at stake, at your ledger, for what a node promises: its bond is lost if it sells a slot twice."""
    each: Annotated[Requirements, Meta(extra={"flat": True})] = Requirements()
    any_of: Annotated[tuple[Requirements, ...], Meta(max_length=ALTERNATIVES_MAX)] = ()
    """Alternatives, each a section with fields from `device` to `currency`, of which a node must meet one as well."""

    @property
    def wish(self) -> Wish:
        return Wish(self.each, self.any_of)

    @property
    def needed(self) -> Needed:
        return Needed(self.nodes_min, self.flops_together)


class JobFile(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job as its user wrote it, paths made absolute."""

    name: Name = "job"
    """The run's name; its folder is runs/<name>. Without it, the job file's own name."""
    seed: Annotated[int, Meta(ge=0, le=1 << 53)] = 0
    """Start weights, sample order and held-out choice follow from it."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    tokens: Annotated[int, Meta(ge=1, le=1 << 53, extra={"quantity": "count"})] = 2_000_000
    """The budget: training ends when so many tokens were accepted."""
    budget: Annotated[int, Meta(ge=0, le=AMOUNT_MAX, extra={"quantity": "money"})] | None = None
    """What the job may cost at most, such as 2.50, in the currency of your ledger. Without it, or `--budget`, it takes
    only nodes that work for nothing."""
    deadline_s: Annotated[float, Meta(gt=0, le=365 * 86_400)] | None = None
    """In how long it should be done. A job with a budget then takes the cheapest nodes that together are fast enough;
    without a deadline those that do the most work for their money."""
    batch_samples: Annotated[int, Meta(ge=1, le=1 << 20)] = 16
    """Samples in one inner step."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What members compute in; auto takes bfloat16 when every member has an accelerator that is fast at it."""
    optimizer: OptimizerSettings = OptimizerSettings()
    rounds: RoundsSection = RoundsSection()
    replay: ReplaySettings = ReplaySettings()
    requirements: RequirementsSection = RequirementsSection()


def load_job(path: Path) -> JobFile:
    """Read and check a job file. Raises BadDocument, UnknownField, BadValue, ContradictoryJob, MissingPath: one
    sentence each, with file, line and field."""
    return parse_job(read_job_bytes(path), path)


def read_job_bytes(path: Path) -> bytes:
    """A job file's bytes, for `parse_job` and the run folder. Raises BadDocument."""
    try:
        if path.is_dir():
            raise BadDocument(f"{path} is a directory, not a job file; to go on with a run add --resume.")
        with path.open("rb") as file:
            text = file.read(DOCUMENT_MAX_BYTES + 1)
    except OSError as error:
        raise BadDocument(f"The job file {path} cannot be read: {error.strerror}.") from error
    if len(text) > DOCUMENT_MAX_BYTES:
        raise BadDocument(f"{path} is larger than a job file may be ({DOCUMENT_MAX_BYTES} bytes); is it the data?")
    return text


def parse_job(text: bytes, path: Path, *, begun: bool = False) -> JobFile:
    """As `load_job`, for bytes that were read from `path` before. A run that was `begun` holds its data and model
    itself: where their paths once led is then not looked at."""
    document = documents.read_document(text, JobFile, path.name)
    job = document.value
    directory = path.resolve().parent
    if "name" not in document.lines:
        job = msgspec.structs.replace(job, name=_name_of(path))
    job = msgspec.structs.replace(job, requirements=_checked_requirements(document))
    if begun:
        return job
    return msgspec.structs.replace(
        job, model=_checked_model(document, directory), data=_checked_data(document, directory)
    )


def schema() -> dict[str, Any]:
    """A JSON Schema of job files, for editors."""
    return documents.json_schema(JobFile)


def explain() -> list[documents.Field]:
    """Every field of a job file, in order; `explain_markdown` and `--help` are made from it."""
    return list(documents.all_fields(JobFile))


def explain_markdown() -> str:
    """The fields as a Markdown table: the one in docs/jobs.md."""
    rows = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    for field in explain():
        takes, default = ("", "") if field.section else (documents.describe(field), documents.show_default(field))
        rows.append(f"| `{field.path}` | {takes} | {default} | {field.meaning} |")
    return "\n".join(rows) + "\n"


# --- what no single field can say -----------------------------------------------------------------------------------


def _name_of(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:48]
    return name or "job"


def _checked_model(document: Document[JobFile], directory: Path) -> ModelSection:
    model = document.value.model
    said = [name for name in ("preset", "config", "checkpoint", "script") if getattr(model, name) is not None]
    if len(said) > 1:
        raise ContradictoryJob(
            f"{document.at(f'model.{said[1]}')} stands beside model.{said[0]}; a model comes from one of preset, "
            "config, checkpoint and script."
        )
    if model.preset is not None and model.preset not in PRESETS:
        raise BadValue(f"{document.at('model.preset')} must be one of {', '.join(PRESETS)}, not {model.preset!r}.")
    config = model.config and _existing(document, "model.config", model.config, directory)
    checkpoint = model.checkpoint and _existing(document, "model.checkpoint", model.checkpoint, directory)
    if checkpoint and not Path(checkpoint).is_dir():
        raise MissingPath(f"{document.at('model.checkpoint')}: {checkpoint} is not a directory with a config.json.")
    if model.script is not None:
        script = _existing(document, "model.script", model.script, directory)
        return ModelSection(script=script, tokenizer="bytes")
    tokenizer = model.tokenizer
    if tokenizer == "auto":
        own = bool(checkpoint) and (Path(checkpoint or "") / "tokenizer.json").is_file()
        tokenizer = checkpoint if own and checkpoint else "bytes"
    elif tokenizer != "bytes":
        tokenizer = _existing(document, "model.tokenizer", tokenizer, directory)
    preset = model.preset if said else "tiny"
    return ModelSection(preset=preset, config=config, checkpoint=checkpoint, tokenizer=tokenizer)


def _checked_data(document: Document[JobFile], directory: Path) -> DataSection:
    data = document.value.data
    own_loop = document.value.model.script is not None
    if own_loop and "data" in document.lines:
        raise ContradictoryJob(f"{document.at('data')} stands beside model.script; a script has data of its own.")
    if not data.paths and not own_loop:
        missing = "must be at least one path" if "data.paths" in document.lines else "is missing"
        raise BadValue(f"{document.at('data.paths')} {missing}; write a text, or a list of such.")
    paths = tuple(_existing(document, "data.paths", path, directory, pattern=True) for path in data.paths)
    return msgspec.structs.replace(data, paths=paths)


def _checked_requirements(document: Document[JobFile]) -> RequirementsSection:
    wanted = document.value.requirements
    if wanted.nodes_min > wanted.nodes_max:
        field = "requirements.nodes_min" if "requirements.nodes_min" in document.lines else "requirements.nodes_max"
        raise ContradictoryJob(
            f"{document.at(field)}: at least {wanted.nodes_min} nodes and at most {wanted.nodes_max} cannot both be."
        )
    return wanted


def _existing(document: Document[JobFile], field: str, text: str, directory: Path, *, pattern: bool = False) -> str:
    """A path that leads somewhere, made absolute. Raises MissingPath."""
    if "\x00" in text:
        raise MissingPath(f"{document.at(field)}: a path has no zero byte in it.")
    try:
        path = directory / Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise MissingPath(f"{document.at(field)}: {text!r} leads to no home directory.") from error
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise MissingPath(f"{document.at(field)}: {path} is empty (0 bytes).")
        elif not path.exists():
            if not pattern or not glob.has_magic(text):
                raise MissingPath(f"{document.at(field)}: there is no {path}.")
            if next(glob.iglob(str(path), recursive=True), None) is None:  # noqa: PTH207 (an absolute pattern)
                raise MissingPath(f"{document.at(field)}: no file fits {path}.")
    except OSError as error:  # a name that is too long, a directory that may not be looked into
        raise MissingPath(f"{document.at(field)} leads nowhere: {error.strerror} ({path}).") from error
    return str(path)
