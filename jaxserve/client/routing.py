"""Which replica of the engine gets a request. No jax."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.page_groups import tokens_kept
from jaxserve.pages import PageTables, block_hashes
from jaxserve.request import EngineInfo, Request

AFFINITY = 0.25
"""How much more load, as a share of what a replica can take, a request accepts for pages that it need not compute."""


@dataclass(slots=True)
class _InFlight:
    """A request that a replica has, and what of it counts as load."""

    replica: int
    unfinished: int
    tokens: int


class Router:
    """Sends each request to the replica with the most room, or where the beginning of its prompt is. For any thread.

    Load is what the requests in flight take of a replica: of its sequences (max_num_seqs), or of its pages if they come
    to their full length, whichever share is larger. A request goes to the replica that holds most pages of its prompt's
    beginning, unless that one's load is more than AFFINITY above the least; then, and where nobody has such a page, it
    goes to the least loaded. A page is known once it is computed, so prompts that begin alike and come all at once are
    spread.
    """

    def __init__(self, infos: Sequence[EngineInfo], tables: Sequence[PageTables], *, prefix_caching: bool):
        """`infos` and `tables`: of each replica. The tables are asked while their engines run."""
        self._infos, self._tables, self._prefix_caching = infos, tables, prefix_caching
        self._lock = threading.Lock()
        self._flights: dict[str, _InFlight] = {}
        self._sequences = [0] * len(infos)
        self._tokens = [0] * len(infos)

    def admit(self, request: Request) -> int:
        """The replica that is to have the request; it counts as load from now on."""
        params, longest = request.params, self._infos[0].max_model_len
        wanted = longest if params.max_tokens is None else len(request.prompt_token_ids) + params.max_tokens
        tokens = params.n * tokens_kept(self._infos[0].windows, min(wanted, longest))
        known = self._known(request)
        with self._lock:
            index = self._choose(known)
            self._flights[request.id] = _InFlight(index, params.n, tokens)
            self._sequences[index] += params.n
            self._tokens[index] += tokens
        return index

    def finished(self, request_id: str) -> None:
        """One sequence of a request has ended. Of a request that was withdrawn meanwhile nothing is known any more."""
        with self._lock:
            flight = self._flights.get(request_id)
            if flight is None:
                return
            flight.unfinished -= 1
            self._sequences[flight.replica] -= 1
            if not flight.unfinished:
                self._tokens[flight.replica] -= flight.tokens
                del self._flights[request_id]

    def withdraw(self, request_id: str) -> int | None:
        """The replica that has a request, which is load no more; None if nobody has it."""
        with self._lock:
            flight = self._flights.pop(request_id, None)
            if flight is None:
                return None
            self._sequences[flight.replica] -= flight.unfinished
            self._tokens[flight.replica] -= flight.tokens
            return flight.replica

    def _known(self, request: Request) -> list[int]:
        """How many pages of the prompt's beginning each replica holds, of those that the request could use."""
        size, prompt = self._infos[0].page_size, request.prompt_token_ids
        usable = max(0, len(prompt) - 1) // size * size  # the last token is computed always
        nothing = [0] * len(self._tables)
        if not usable or not all(0 <= token < 2**32 for token in prompt):  # the engine refuses others
            return nothing
        if not self._prefix_caching or request.params.prompt_logprobs is not None:
            return nothing
        first = block_hashes(prompt[:size], size, request.cache_salt)
        if not any(
            tables.may_know(first[0]) for tables in self._tables
        ):  # most often: the other hashes need not be made
            return nothing
        hashes = block_hashes(prompt[:usable], size, request.cache_salt)
        return [tables.known(hashes) for tables in self._tables]

    def _choose(self, known: list[int]) -> int:
        loads = [self._load(i) for i in range(len(self._infos))]
        least = min(range(len(loads)), key=lambda i: loads[i])
        best = max(range(len(loads)), key=lambda i: (known[i], -loads[i]))
        return best if known[best] and loads[best] <= loads[least] + AFFINITY else least

    def _load(self, index: int) -> float:
        info = self._infos[index]
        return max(self._sequences[index] / info.max_num_seqs, self._tokens[index] / (info.num_pages * info.page_size))
