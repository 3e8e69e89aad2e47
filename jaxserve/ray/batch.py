"""An offline job on Ray Data: rows are read here, answered by actors that hold an engine each, and kept here.

Ray starts a dead actor again, however often, and sends what it had in hand to another one; the store knows rows by
their numbers. Together: once each. Memory: of input and results what Ray's object store holds, and an entry of the
store's index for each row that has overtaken another.
"""

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from jaxserve.batch_job import Compute, Watch, Work, unwatched
from jaxserve.batch_job.files import Source
from jaxserve.batch_job.identity import differences
from jaxserve.batch_job.job import AT_ONCE, CHUNK_BYTES, add, check_errors
from jaxserve.batch_job.rows import CHAT, COMPLETIONS, EMBEDDINGS, CustomIds, Row, count_rows, read_rows
from jaxserve.batch_job.store import SYNC_S
from jaxserve.config import MeshShape, RayOptions
from jaxserve.embedding import says_embedding
from jaxserve.errors import BatchStopped, ConfigError
from jaxserve.ray.placement import NEEDS, Placement, place, remote_args
from jaxserve.ray.worker import Answered, Assignment, Worker, packed, unpacked
from jaxserve.text import has_chat_template
from jaxserve.weights import open_checkpoint

try:
    import ray
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask
except ImportError:
    raise ConfigError(NEEDS) from None

CALLS = 4
"""Tables in work at a worker: while one ends with its slowest row, the others keep the engine busy."""
OBJECT_STORE_BYTES = 2**29
PATIENCE_S = 0.5


def on_ray(options: RayOptions, watch: Watch = unwatched) -> Compute:
    """Computes a job with engines on Ray. Whoever has called ray.init before says himself where that is."""

    async def compute(work: Work) -> bool:
        async with connected(options.ray_address):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            job = RayJob(work, place(nodes, options, work.engine))
            async with watch(job, work.store, work.rows):
                return await job.run()

    return compute


@contextlib.asynccontextmanager
async def connected(address: str | None) -> AsyncIterator[None]:
    """A connection to Ray, or to a Ray of one's own if there is no address; it ends with the body."""
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"address": address or "local", "logging_level": logging.WARNING}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(**settings)  # in this thread, which has the signals
    except Exception as error:  # of many kinds, bare Exception among them
        what = f"cannot reach Ray at {address}" if address else "Ray does not start"
        raise ConfigError(f"{what}: {error}") from error
    try:
        yield
    finally:
        await asyncio.shield(asyncio.to_thread(ray.shutdown))


class RayJob:
    """Rows through a dataset of Ray's into a store, each that the store does not have."""

    def __init__(self, work: Work, placement: Placement):
        self.stopping = False
        self.ignored: set[str] = set()
        self._work, self._placement = work, placement
        self._arrived: asyncio.Queue[Answered | Exception | None] = asyncio.Queue(maxsize=1)
        self._stop = asyncio.Event()
        self._over = threading.Event()
        self._head: dict[str, str] | None = None

    def stop(self) -> str:
        """Takes in no further result; says what becomes of the rows in flight."""
        self.stopping = True
        self._stop.set()
        return "stopping; the rows in flight will be computed again when the job goes on"

    async def run(self) -> bool:
        """Works until every row has its result, or `stop` was called; whether it is the former.

        Raises BatchStopped when max_errors, the disk or Ray end it; ConfigError or CheckpointError when a worker's
        engine does not start, or is not what the others are.
        """
        work = self._work
        check_errors(work.store, work.options.max_errors)
        rows = await asyncio.to_thread(count_rows, work.sources)
        if (0 if work.fresh else work.store.rows) == rows:  # all there, but for the last words; or no row at all
            work.agree({})
            return True
        chat = not work.options.raw and await asyncio.to_thread(has_chat_template, work.path)
        bare = CHAT if chat else COMPLETIONS
        if await asyncio.to_thread(_embeds, work):
            bare = EMBEDDINGS
        dataset = await asyncio.to_thread(self._dataset, bare)
        loop = asyncio.get_running_loop()
        # Not to be waited for: what the dataset does not give, nobody can take back from it.
        threading.Thread(target=self._receive, args=(dataset, loop), name="ray results", daemon=True).start()
        syncing = asyncio.create_task(self._keep_synced())
        try:
            while (answered := await self._next()) is not None:
                self._take(answered)
        finally:
            self._over.set()
            syncing.cancel()
        if self.stopping:
            return False
        if work.store.rows != rows:
            raise BatchStopped(f"Ray returned {work.store.finished} of {rows} rows: run the same again to go on")
        return True

    def _dataset(self, bare: str) -> Any:
        work, placement = self._work, self._placement
        options, store = work.options, work.store
        assignment = Assignment(
            engine=placement.options(work.engine),
            name=work.name,
            digest=work.digest,
            seed=options.seed,
            given=options.given,
            settings=work.settings,
            now=work.now,
            threads=placement.threads,
        )
        begun = (0, frozenset[int]()) if work.fresh else (store.rows, store.waiting)
        read = functools.partial(_tables, work.sources, bare, options.column, begun, self._rows_a_call())
        with _settings():
            requests = ray.data.read_datasource(
                _Requests(read),
                num_cpus=0,  # beside engines that have all CPUs
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},  # the files are here
                override_num_blocks=1,
            )
            return requests.map_batches(
                Worker,
                fn_constructor_args=(assignment,),
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    size=placement.workers,
                    max_concurrent_calls_per_actor=CALLS,
                    max_tasks_in_flight_per_actor=CALLS,
                    enable_true_multi_threading=True,
                ),
                **remote_args(placement.resources),
            )

    def _rows_a_call(self) -> int:
        """So many that all calls of a worker fill its engine; fewer if otherwise some workers would get none."""
        engine, placement = self._work.engine, self._placement
        replicas = MeshShape.parse(engine.device.mesh).data if engine.device.mesh is not None else 1
        seqs = (engine.schedule.max_num_seqs or (64 if placement.on_cpu else 256)) * replicas
        share = self._work.rows // (placement.workers * CALLS)
        return max(1, min(AT_ONCE * seqs // CALLS, share))

    def _receive(self, dataset: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Hands on what the dataset gives, then None or what went wrong; ends the dataset when nobody takes it."""

        def put(what: Answered | Exception | None) -> None:
            putting = asyncio.run_coroutine_threadsafe(self._arrived.put(what), loop)
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    return putting.result(PATIENCE_S)
            putting.cancel()

        try:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for cell in table.column("answered"):
                    put(unpacked(cell))
                if self._over.is_set():
                    return
            put(None)
        except Exception as error:
            if not self._over.is_set():
                put(error)

    async def _next(self) -> Answered | None:
        """What has come next; None at the end, and when the job stops."""
        waits = [asyncio.ensure_future(self._arrived.get()), asyncio.ensure_future(self._stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            arrived = waits[0].result() if waits[0].done() else None
        finally:
            for task in waits:
                task.cancel()
        if self.stopping:
            return None
        if isinstance(arrived, Exception):
            last = (str(arrived).strip().splitlines() or [type(arrived).__name__])[-1]
            raise BatchStopped(
                f"Ray gave up; its output says why ({last}). What is done is safe: run the same again to go on"
            ) from arrived
        return arrived  # type: ignore[return-value]

    def _take(self, answered: Answered) -> None:
        if answered.error is not None:
            raise answered.error.rebuild()
        if self._head is None:
            self._check(self._work.head, answered, "this process")
            self._head = dict(answered.head)
            self._work.agree(self._head)
        elif answered.head != self._head:
            self._check(self._head, answered, "the others")
        self.ignored |= answered.ignored
        for result in answered.results:
            if result.number not in self._work.store:
                add(self._work.store, result, self._work.options.max_errors)

    def _check(self, expected: dict[str, str], answered: Answered, whose: str) -> None:
        here = {name: value for name, value in answered.head.items() if name in expected}
        if other := differences(expected, here):
            raise ConfigError(
                f"a worker differs from {whose}: {'; '.join(other)}. Install and give the same everywhere"
            )

    async def _keep_synced(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self._work.store.sync)


class _Requests(ray.data.Datasource):
    """The tables that `read` yields, each a block of its own."""

    def __init__(self, read: Callable[[], Iterator[Any]]):
        super().__init__()
        self._read = read

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list:
        return [ReadTask(self._read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


def _tables(
    sources: Sequence[Source], bare: str, column: str | None, begun: tuple[int, frozenset[int]], most: int
) -> Iterator[Any]:
    """Tables of up to `most` rows, of those that are neither among the first begun[0] nor in begun[1]."""
    first, others = begun
    rows: list[Row] = []
    size = 0
    with contextlib.closing(CustomIds()) as ids:
        for row in map(ids.checked, read_rows(list(sources), bare=bare, column=column)):
            if row.number < first or row.number in others:
                continue
            rows.append(row)
            size += len(row.body)
            if len(rows) >= most or size >= CHUNK_BYTES:
                yield packed(rows)
                rows, size = [], 0
        if rows:
            yield packed(rows)


def _embeds(work: Work) -> bool:
    """Whether the workers' engines will give embeddings."""
    options, config = work.engine.model, open_checkpoint(work.path).config
    return says_embedding(work.path, config, task=options.task, pooling=options.pooling)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Ray Data's settings for a dataset that is made in the body."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    # One byte: a block goes on as soon as it is there, and one of a single cell is never divided. A divided result
    # could be divided otherwise when it is computed a second time, and Ray would take half of each.
    wanted = {"target_max_block_size": 1, "enable_progress_bars": False}
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
