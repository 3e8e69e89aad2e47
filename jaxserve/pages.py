"""Which page of the KV cache holds what: reference counts, and a prefix cache by chained block hashes. No jax.

PagePool knows pages, PageTables which of them sequences hold, group by group of layers (see page_groups.py).

Every page is in exactly one state:

    free     holds nothing worth keeping
    cached   referenced by nobody, but registered under a block hash; reclaimed least recently used first
    owned    referenced by one or more sequences (and registered, once it is full)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice

from jaxserve.page_groups import first_block

GIVEN_UP = -1
"""In a sequence's list of pages, in the place of one that it holds no more, or never did: no token to come sees it."""

type Tables = list[list[int]]
"""A sequence's pages: for each group of layers a list by block, of page_size tokens each."""


def block_hashes(tokens: Sequence[int], page_size: int, salt: str) -> list[bytes]:
    """One hash for each full block of tokens; it names the block and everything before it, within one salt."""
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, page_size, salt)
    return hashes


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], page_size: int, salt: str) -> None:
    """Appends to `hashes` those of the full blocks of `tokens` that it does not cover yet."""
    for i in range(len(hashes), len(tokens) // page_size):
        parent = hashes[-1] if hashes else blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest()
        block = b"".join(t.to_bytes(4, "little") for t in tokens[i * page_size : (i + 1) * page_size])
        hashes.append(blake2b(parent + block, digest_size=16).digest())


class PagePool:
    """A fixed number of pages. `take`/`release` pair up; `match` and `register` are the prefix cache."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._hash: list[bytes | None] = [None] * num_pages
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences own."""
        return 1.0 - self.available / self.num_pages

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of the longest registered prefix of `hashes`. Nothing is referenced yet: see `share`.

        Any thread may ask; what it hears may have changed when it acts on it.
        """
        pages: list[int] = []
        for h in hashes:
            page = self.find(h)
            if page is None:
                break
            pages.append(page)
        return pages

    def find(self, block_hash: bytes) -> int | None:
        """The page that holds a block. Any thread may ask, as above."""
        return self._by_hash.get(block_hash)

    def share(self, pages: Sequence[int]) -> None:
        """One more reference to each of the pages that `match` found."""
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, reclaiming cached ones if it must; None if there are too few."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, block_hash: bytes) -> None:
        """The page now holds the full block `block_hash`. The first page of a hash keeps it."""
        assert self._references[page] > 0, "only an owned page can be registered"
        if self._hash[page] is None and block_hash not in self._by_hash:
            self._hash[page] = block_hash
            self._by_hash[block_hash] = page

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page; the last blocks of a sequence become the first to be reclaimed."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, "page released more often than taken"
            if self._references[page] == 0:
                if self._hash[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def discard(self, hashes: Iterable[bytes]) -> None:
        """Takes the pages of some blocks their names: nobody will ask for them. Those that nobody holds are free."""
        for block_hash in hashes:
            page = self.find(block_hash)
            if page is not None:
                self._forget(page)
                if self._references[page] == 0:
                    del self._cached[page]
                    self._free.append(page)

    def forget(self) -> None:
        """Takes every page its name: what they hold is of no use to anyone who comes from now on."""
        self._free += self._cached
        self._cached.clear()
        self._by_hash.clear()
        self._hash = [None] * self.num_pages

    def check_integrity(self, owned: Sequence[Sequence[int]]) -> None:
        """Asserts that free + cached + owned pages are all pages, given the page lists of every live sequence."""
        counts = [0] * self.num_pages
        for pages in owned:
            for page in pages:
                counts[page] += 1
        assert counts == self._references, "reference counts differ from the sequences' page lists"
        free, cached = set(self._free), set(self._cached)
        used = {page for page, n in enumerate(counts) if n}
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached and not free & used and not cached & used, "a page is in two states"
        assert len(free) + len(cached) + len(used) == self.num_pages, "a page is lost"
        assert all(self._hash[p] is not None for p in cached), "a cached page without a hash"
        assert all(self._hash[p] is None for p in free), "a free page with a hash"
        assert self._by_hash == {h: p for p, h in enumerate(self._hash) if h is not None}, "hash table out of step"

    def _forget(self, page: int) -> None:
        block_hash = self._hash[page]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hash[page] = None


class PageTables:
    """What sequences hold of a pool. `windows`: of each group of layers, those without one first.

    A group with a window has a page of each block that a token to come can see, and takes pages as a prompt's chunks
    need them; one without has a page of every block, and is given those of a whole prompt at once. So in `Tables` the
    lists of all groups with a window are equally long, and no longer than the others.
    """

    def __init__(self, pool: PagePool, windows: Sequence[int | None] = (None,)):
        assert windows and sorted(windows, key=lambda w: w is not None) == list(windows)
        self.pool, self.windows = pool, tuple(windows)
        self._whole = sum(w is None for w in windows)

    def known(self, hashes: Sequence[bytes]) -> int:
        """Blocks of the longest prefix of `hashes` of which there is all that a token after it sees.

        Any thread may ask; what it hears may have changed when it acts on it.
        """
        end = len(hashes)
        for group in range(self._whole):
            end = len(self.pool.match(_named(h, group) for h in islice(hashes, end)))
        while end:
            lacking = self._lacking(hashes, end)
            if lacking is None:
                break
            end = lacking  # every longer prefix needs that block, too
        return end

    def may_know(self, first: bytes) -> bool:
        """Whether a prompt whose first block is this one can have a known prefix at all; for any thread."""
        return not self._whole or self.pool.find(first) is not None

    def match(self, hashes: Sequence[bytes]) -> Tables:
        """The pages of that prefix. Nothing is referenced yet: see `share`."""
        end, size = self.known(hashes), self.pool.page_size
        tables: Tables = []
        for group, window in enumerate(self.windows):
            first = first_block(end * size, window, size)
            pages = self.pool.match(_named(h, group) for h in hashes[first:end])
            assert len(pages) == end - first
            tables.append([GIVEN_UP] * first + pages)
        return tables

    def _lacking(self, hashes: Sequence[bytes], end: int) -> int | None:
        """The last block before `end` that a group with a window needs and does not have."""
        size = self.pool.page_size
        for group, window in enumerate(self.windows[self._whole :], self._whole):
            for block in range(end - 1, first_block(end * size, window, size) - 1, -1):
                if self.pool.find(_named(hashes[block], group)) is None:
                    return block
        return None

    def share(self, tables: Tables) -> None:
        """One more reference to each of the pages that `match` found."""
        for pages in tables:
            self.pool.share(_held(pages))

    def extend(self, tables: Tables, start: int, count: int, whole: int = 0) -> int:
        """Takes the pages for `count` tokens from `start` on, and gives up those that none of these sees.

        Groups without a window get those of all `whole` tokens at once. Returns how many tokens have their pages: less
        than `count` where groups with a window find too few, 0 where nothing could be taken.
        """
        pool, size = self.pool, self.pool.page_size
        for window, pages in zip(self.windows[self._whole :], tables[self._whole :], strict=True):
            block = first_block(start, window, size) - 1
            while block >= 0 and pages[block] != GIVEN_UP:
                pool.release([pages[block]])
                pages[block] = GIVEN_UP
                block -= 1
        blocks = -(-max(whole, start + count) // size)
        missing = [max(0, blocks - len(pages)) for pages in tables[: self._whole]]
        room, windowed = pool.available - sum(missing), len(tables) - self._whole
        if room < 0:
            return 0
        if windowed:
            held = len(tables[-1])
            count = min(count, (held + room // windowed) * size - start)
            if count <= 0:
                return 0
            missing += [max(0, -(-(start + count) // size) - held)] * windowed
        for pages, number in zip(tables, missing, strict=True):
            taken = pool.take(number)
            assert taken is not None
            pages += taken
        return count

    def register(self, tables: Tables, block: int, block_hash: bytes) -> None:
        """A block's pages are full now, and can be shared."""
        for group, pages in enumerate(tables):
            if pages[block] != GIVEN_UP:
                self.pool.register(pages[block], _named(block_hash, group))

    def release(self, tables: Tables) -> None:
        """Drops all of them."""
        for pages in tables:
            self.pool.release(_held(pages))

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Nobody will ask for these blocks: see `PagePool.discard`."""
        for group in range(len(self.windows)):
            self.pool.discard(_named(h, group) for h in reversed(hashes))

    def check_integrity(self, tables: Sequence[Tables], positions: Sequence[int]) -> None:
        """Asserts that every page is where it should be, given all live sequences' tables, and that each sequence has
        what the token at its next position sees."""
        self.pool.check_integrity([_held(pages) for groups in tables for pages in groups])
        size = self.pool.page_size
        for groups, position in zip(tables, positions, strict=True):
            for window, pages in zip(self.windows, groups, strict=True):
                assert GIVEN_UP not in pages[first_block(position, window, size) :], "gave up what is still seen"
                assert len(pages) * size >= position, "computed past its pages"


def _named(block_hash: bytes, group: int) -> bytes:
    """By what the pool knows a group's page of a block."""
    return block_hash + bytes((group,)) if group else block_hash


def _held(pages: Sequence[int]) -> list[int]:
    return [page for page in pages if page != GIVEN_UP]
