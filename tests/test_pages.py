"""The page pool: reference counts, block hashes, reclaiming in order of disuse."""

import pytest

from jaxserve.pages import PagePool, block_hashes


def test_hashes_chain_and_are_salted():
    a = block_hashes([1, 2, 3, 4, 5], 2, "")
    assert len(a) == 2
    assert a == block_hashes([1, 2, 3, 4, 9], 2, "")
    assert a[1] != block_hashes([9, 2, 3, 4], 2, "")[1], "a block's hash names everything before it"
    assert a[0] != block_hashes([1, 2], 2, "tenant")[0]
    assert block_hashes([1, 2], 2, "x")[0] != block_hashes([2, 1], 2, "x")[0]


def test_pages_are_shared_kept_and_reclaimed_least_recently_used_first():
    pool = PagePool(4, 2)
    first, second = block_hashes([1, 2, 3, 4], 2, "")
    a = pool.take(2)
    pool.register(a[0], first)
    pool.register(a[1], second)
    assert pool.match([first, second]) == a
    pool.share(a)
    pool.release(a)
    pool.check_integrity([a])
    pool.release(a)
    pool.check_integrity([])
    assert pool.available == 4 and pool.match([first, second]) == a, "released pages stay in the cache"
    b = pool.take(3)  # two free ones, then the end of the old prefix
    assert pool.match([first, second]) == a[:1]
    assert a[1] in b and a[0] not in b
    assert pool.take(2) is None
    pool.check_integrity([b])


def test_a_second_page_of_the_same_block_is_not_registered():
    pool = PagePool(2, 1)
    (h,) = block_hashes([7], 1, "")
    (a,), (b,) = pool.take(1), pool.take(1)
    pool.register(a, h)
    pool.register(b, h)
    assert pool.match([h]) == [a]
    pool.release([a])
    pool.release([b])
    pool.check_integrity([])
    assert pool.match([h]) == [a] and pool.available == 2


def test_integrity_check_bites():
    pool = PagePool(2, 1)
    pages = pool.take(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([])
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages)


def test_what_is_forgotten_is_not_found_and_its_pages_are_free():
    pool = PagePool(4, 2)
    held, kept = block_hashes([1, 2, 3, 4], 2, ""), block_hashes([5, 6], 2, "")
    owned, cached = pool.take(2), pool.take(1)
    for page, name in zip([*owned, *cached], [*held, *kept], strict=True):
        pool.register(page, name)
    pool.release(cached)
    pool.forget()
    pool.check_integrity([owned])
    assert pool.match(held) == pool.match(kept) == [] and pool.available == 2
    pool.release(owned)
    pool.check_integrity([])
    assert sorted(pool.take(4)) == [0, 1, 2, 3]


def test_pages_that_are_discarded_are_free_as_soon_as_nobody_holds_them():
    pool = PagePool(6, 4)
    a, b, c = block_hashes(range(12), 4, "")
    pages = pool.take(3)
    for page, h in zip(pages, (a, b, c), strict=True):
        pool.register(page, h)
    pool.release(pages[1:])  # cached, both
    pool.discard([b"of no page", a, c])
    assert pool.match([a]) == [] and pool.find(c) is None and pool.find(b) == pages[1]
    pool.check_integrity([pages[:1]])
    assert pool.take(1) == pages[2:], "the last to be free is the first to be taken"
    pool.release(pages[:1])
    assert pool.available == 5
    pool.check_integrity([pages[2:]])
