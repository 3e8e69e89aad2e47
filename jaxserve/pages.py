"""Which page of the KV cache holds what: reference counts, and a prefix cache by chained block hashes. No jax.

Every page is in exactly one state:

    free     holds nothing worth keeping
    cached   referenced by nobody, but registered under a block hash; reclaimed least recently used first
    owned    referenced by one or more sequences (and registered, once it is full)
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


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

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest registered prefix of `hashes`. Nothing is referenced yet: see `share`.

        Any thread may ask; what it hears may have changed when it acts on it.
        """
        pages: list[int] = []
        for h in hashes:
            page = self._by_hash.get(h)
            if page is None:
                break
            pages.append(page)
        return pages

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
