"""Offline jobs: a file of requests in, a file of answers out, every row once and the same bytes whatever happens.

    files.py, rows.py, tables.py    the input, a row at a time, and tables as output
    answers.py                      a row through the model: what the HTTP server would answer
    job.py                          the rows of a job through one engine
    records.py                      one line of output; ids and seeds made from the input, never from time or order
    store.py                        the protocol by which results reach the disk exactly once
    captures.py                     the model's inner values, if they are asked for, beside the output
    identity.py                     what a job depends on, so that only the same job is resumed

A job's results are lines in input order, in OUT itself where that is a local .jsonl file, otherwise in OUT.rows (of a
remote OUT: in the working directory), from which OUT is made at the end. Run again, a job goes on where it was.
"""

import asyncio
import concurrent.futures
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from jaxserve.batch_job import captures
from jaxserve.batch_job.answers import Answers
from jaxserve.batch_job.files import Source, digest, find, is_remote, kind_of, remote_size, upload
from jaxserve.batch_job.identity import describe, describe_engine, differences
from jaxserve.batch_job.job import Job
from jaxserve.batch_job.records import Names
from jaxserve.batch_job.rows import CHAT, COMPLETIONS, EMBEDDINGS, read_rows
from jaxserve.batch_job.store import Store
from jaxserve.client.remote import RemoteEngine
from jaxserve.config import OFFLINE_DECODE_STEPS, EngineOptions, engine_options_of, model_name
from jaxserve.errors import BatchStopped, ConfigError
from jaxserve.hub import resolve_model
from jaxserve.request import SamplingParams
from jaxserve.server.wire import SamplingBody
from jaxserve.text import TextModel


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What a job is to do."""

    input: str
    output: str
    overwrite: bool = False
    """Replace an output that another job has written."""
    max_errors: int | None = None
    raw: bool = False
    """Continue bare prompts as they are; otherwise each is a user's message, if the model has a chat template. An
    embedding model embeds them in any case."""
    column: str | None = None
    seed: int = 0
    given: Mapping[str, Any] = field(default_factory=dict)
    """Fields of request bodies, for those that lack them."""
    work_dir: Path = Path()
    """Where a remote output is prepared."""

    def __post_init__(self) -> None:
        if kind_of(self.output) == "text":
            raise ConfigError(f"the output must end in .jsonl, .parquet or .arrow, got {self.output}")
        if self.max_errors is not None and self.max_errors < 0:
            raise ConfigError(f"max_errors must be at least 0, got {self.max_errors}")


@dataclass(frozen=True)
class BatchResult:
    """How far a job is: rows with a result, and of these the failed ones; tokens generated."""

    output: str
    rows: int
    failed: int
    completion_tokens: int
    complete: bool


class Running(Protocol):
    """A job while its rows are computed: job.Job, or one whose engines are elsewhere."""

    stopping: bool

    @property
    def ignored(self) -> set[str]:
        """Fields of bodies that nothing here knows."""
        ...

    def stop(self) -> str:
        """Begins no further row; says what becomes of those in flight."""
        ...


type Watch = Callable[[Running, Store, int], AbstractAsyncContextManager[Any]]
"""Entered while rows are computed; the number is about how many there are."""


def unwatched(job: Running, store: Store, rows: int) -> AbstractAsyncContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class Work:
    """A job whose files are found and whose store is open: what engines have to do."""

    options: BatchOptions
    engine: EngineOptions
    path: Path
    """Of the model."""
    name: str
    sources: list[Source]
    digest: str
    """Of the sources."""
    rows: int
    """About how many there are."""
    settings: Mapping[str, Any]
    head: dict[str, str]
    """What the store's head has to say, as far as it is known."""
    store: Store
    fresh: bool
    """Whether the job begins, rather than goes on."""
    now: datetime
    """When it began."""

    @property
    def names(self) -> Names:
        return Names(self.digest, self.options.seed)

    def agree(self, engine: Mapping[str, str]) -> None:
        """Begins the job, or goes on with it, now that it is known what `describe_engine` says of the engine.

        Raises ConfigError if the rows that are there are from another one, and may not be overwritten.
        """
        self.head |= engine
        if not self.fresh:
            self.fresh = _refused(self.store, self.head, self.options)
        if self.fresh:
            self.store.begin(self.head | {"started": self.now.isoformat()})


type Compute = Callable[[Work], Awaitable[bool]]
"""Fills the store of a job whose engines have agreed; whether it is full."""


def run_batch(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: str | None = None,
    *,
    overwrite: bool = False,
    max_errors: int | None = None,
    raw: bool = False,
    column: str | None = None,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    work_dir: str | os.PathLike[str] = ".",
    served_model_name: str | None = None,
    **options: Any,
) -> BatchResult:
    """Answers a file of requests; as `jaxserve batch` without its display. Called again it goes on where it was.

    sampling: values for rows that lack them, `max_tokens` and the like. options: the fields of ModelOptions,
    ScheduleOptions and DeviceOptions, and `capture`, patterns of inner values to be written beside the output. Raises
    ConfigError for what is wrong with the call, its files or the model; CheckpointError; BatchStopped when the disk,
    the engine or max_errors end the job early.
    """
    known = set(SamplingBody.__struct_fields__) & set(SamplingParams.__struct_fields__) - {"seed", "logprobs"}
    given = dict(sampling or {})
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"sampling has no {unknown[0]!r}; it may have {', '.join(sorted(known))}")
    job = BatchOptions(
        input=os.fspath(input),
        output=os.fspath(output),
        overwrite=overwrite,
        max_errors=max_errors,
        raw=raw,
        column=column,
        seed=seed,
        given=given,
        work_dir=Path(work_dir),
    )
    engine = engine_options_of(model, {"decode_steps": OFFLINE_DECODE_STEPS} | options)
    name = model_name(model, served_model_name)
    path = resolve_model(model, engine.model.revision)

    def work() -> BatchResult:
        return asyncio.run(run_job(job, engine, path, name, in_one_engine(lambda: _opened(engine, path, name))))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a notebook has a loop of its own
        return pool.submit(work).result()


def in_one_engine(opened: Callable[[], AbstractAsyncContextManager[TextModel]], watch: Watch = unwatched) -> Compute:
    """Computes with the model that `opened` opens."""

    async def compute(work: Work) -> bool:
        async with opened() as text:
            work.agree(describe_engine(text.client.info, work.engine))
            options = work.options
            bare = COMPLETIONS if text.template is None or options.raw else CHAT
            if text.client.info.embedding is not None:
                bare = EMBEDDINGS
            values = None
            if taps := text.client.info.taps:
                values = captures.Captures(captures.folder_of(Path(options.output)), taps)
                values.begin(work.store)
            job = Job(
                read_rows(work.sources, bare=bare, column=options.column),
                text,
                Answers(text, work.names, given=options.given, now=work.now),
                work.store,
                max_errors=options.max_errors,
                captures=values,
            )
            async with watch(job, work.store, work.rows):
                return await job.run()

    return compute


async def run_job(options: BatchOptions, engine: EngineOptions, path: Path, name: str, compute: Compute) -> BatchResult:
    """Runs a job, or what is left of it, with the model at `path`; see run_batch."""
    sources = find(options.input, options.output)
    local = Path(options.output)
    if is_remote(options.output):
        local = options.work_dir / options.output.rpartition("/")[2]
    if not local.parent.is_dir():
        raise ConfigError(f"no such directory: {local.parent}")
    plain = kind_of(options.output) == "jsonl" and not is_remote(options.output)
    if engine.capture:
        captures.check_installed()
        if is_remote(options.output):
            raise ConfigError(f"capture writes beside the output, and {options.output} is remote; give a local OUT")
    lines = None
    if kind_of(sources[0].path) in ("parquet", "arrow") or kind_of(options.output) != "jsonl":
        from jaxserve.batch_job.tables import check_installed, check_tables

        check_installed()
        if kind_of(sources[0].path) in ("parquet", "arrow"):
            lines = check_tables(sources, options.column, options.output)
    found = await asyncio.to_thread(digest, sources)
    settings = {"output": kind_of(options.output), "raw": options.raw, "column": options.column, "seed": options.seed}
    settings |= {"capture": ", ".join(engine.capture) or "nothing"} | dict(options.given)
    head = describe(found.hex, path, name, engine, settings)
    with contextlib.closing(Store(local if plain else local.with_name(local.name + ".rows"))) as store:
        fresh = _compare(store, head, options, plain, capture=bool(engine.capture))
        if fresh or not store.done:
            now = datetime.now() if fresh or store.head is None else datetime.fromisoformat(store.head["started"])
            rows = found.lines if lines is None else lines
            work = Work(options, engine, path, name, sources, found.hex, rows, settings, head, store, fresh, now)
            if await compute(work):
                store.finish()
        if store.done and not plain and not store.published:
            await asyncio.to_thread(_publish, store, sources, local, options.output)
        return BatchResult(options.output, store.finished, store.failed, store.tokens, store.done)


def _compare(store: Store, head: Mapping[str, str], options: BatchOptions, plain: bool, *, capture: bool) -> bool:
    """Whether the job begins, rather than goes on. Raises ConfigError if the output is not to be touched."""
    remote = is_remote(options.output)
    if store.head is None:
        there = store.taken if plain else remote_size(options.output) is not None if remote else _exists(options.output)
        values = captures.folder_of(Path(options.output))
        taken = options.output if there else str(values) if capture and values.exists() else None
        if taken is not None and not options.overwrite:
            raise ConfigError(
                f"{taken} is there already and no unfinished job's (there is no {store.journal.name}): give "
                "another OUT, or --overwrite to replace it"
            )
        return True
    if _refused(store, head, options):
        return True
    try:
        store.resume()
        if store.published and not (remote_size(options.output) is not None if remote else _exists(options.output)):
            raise ConfigError(
                f"{options.output} was removed after this job wrote it: --overwrite begins the job again, or remove "
                f"{store.journal.name} as well"
            )
    except ConfigError:
        if not options.overwrite:
            raise
        return True
    return False


def _refused(store: Store, head: Mapping[str, str], options: BatchOptions) -> bool:
    """Whether the store's job is another one, which may be overwritten. Raises ConfigError if it may not."""
    assert store.head is not None
    other = differences(store.head, head)
    if other and not options.overwrite:
        raise ConfigError(
            f"{options.output} belongs to another job: {'; '.join(other)}. Give another OUT, or --overwrite to begin "
            "again"
        )
    return bool(other)


def _exists(path: str) -> bool:
    return Path(path).exists()


def _publish(store: Store, sources: list[Any], local: Path, output: str) -> None:
    """Makes OUT of the complete rows."""
    try:
        made = store.path
        if kind_of(output) != "jsonl":
            from jaxserve.batch_job.tables import write_table

            with store.path.open("rb") as records:
                write_table(records, sources, local)
            made = local
        if is_remote(output):
            upload(made, output)
            if made is local:
                local.unlink()
    except (OSError, ConfigError) as error:
        raise BatchStopped(
            f"cannot write {output}: {error}. All rows are safe in {store.path}: mend that, then run the same again"
        ) from error
    store.publish()


@contextlib.asynccontextmanager
async def _opened(options: EngineOptions, path: Path, name: str) -> AsyncIterator[TextModel]:
    """The model's text over an engine in a process of its own, ready to generate."""
    client = RemoteEngine(options, path, model_name=name)
    await client.start()
    try:
        text = await asyncio.to_thread(TextModel.open, path, client, name)
        await client.wait_ready()
        yield text
    finally:
        await asyncio.shield(asyncio.ensure_future(client.stop()))
