"""core/hotpages.py: which written pages are left unprotected."""

import numpy as np
import pytest

from nova_ftvm.core.hotpages import IDLE, MOST, NEAR, TIMES, Budget, HotPages

PAGES = 1 << 12


class Guest:
    """Epochs of a guest: what is found written is what it wrote and what is hot; what changed is what it wrote."""

    def __init__(self, most: int = MOST) -> None:
        self.budget = Budget(most)
        self.hot_pages = HotPages(PAGES, self.budget)
        self.epoch = HotPages.FIRST
        self.unprotected: set[int] = set()

    def writes(self, *written: int, times: int = 1) -> list[int]:
        """Returns what the last epoch protects."""
        cold: list[int] = []
        for _ in range(times):
            self.epoch += 1
            found = np.array(sorted({*written, *self.unprotected}), np.int64)
            cold = self.hot_pages.cold(found).tolist()
            self.unprotected = set(found.tolist()) - set(cold)
            self.hot_pages.on_sent(np.array(sorted(written), np.int64), self.epoch)
            self.hot_pages.learn(found, self.epoch)
        return cold

    def pauses_that_protect(self, *written: int, most: int = 100) -> int:
        """Epochs until all pages are protected."""
        for number in range(most):
            if not self.unprotected:
                return number
            self.writes(*written)
        raise AssertionError(f"still unprotected after {most} epochs: {self.unprotected}")


def test_a_page_that_was_written_once_is_protected() -> None:
    assert Guest().writes(7) == [7]


def test_a_page_that_is_written_in_every_epoch_is_left_alone_after_a_few() -> None:
    guest = Guest()
    assert guest.writes(7, times=TIMES + 1) == [7]
    assert guest.writes(7, 9) == [9]
    assert guest.writes(7, times=50) == []


@pytest.mark.parametrize("every", [2, NEAR])
def test_a_page_that_is_written_often_is_left_alone(every: int) -> None:
    guest = Guest()
    for _ in range(TIMES + 1):
        guest.writes(7)
        guest.writes(times=every - 1)
    assert guest.unprotected == set()
    guest.writes(7)
    assert guest.unprotected == {7}


def test_a_page_that_is_written_seldom_is_protected_each_time() -> None:
    guest = Guest()
    for _ in range(10):
        assert guest.writes(7) == [7]
        guest.writes(times=NEAR)
    assert guest.unprotected == set()


def test_a_hot_page_that_does_not_change_any_more_is_protected_again() -> None:
    guest = Guest()
    guest.writes(7, times=10)
    assert guest.pauses_that_protect() == IDLE + 2
    assert guest.budget.left == MOST


def test_a_hot_page_that_changes_now_and_then_stays_hot() -> None:
    guest = Guest()
    guest.writes(7, times=10)
    for _ in range(5):
        guest.writes(times=IDLE - 1)
        assert guest.writes(7) == []


def test_a_page_that_cooled_has_to_be_written_often_again() -> None:
    guest = Guest()
    guest.writes(7, times=10)
    guest.pauses_that_protect()
    for _ in range(TIMES):
        assert guest.writes(7) == [7]


def test_no_more_pages_than_the_bound_are_left_alone() -> None:
    guest = Guest(most=3)
    guest.writes(*range(10), times=20)
    assert len(guest.unprotected) == 3
    assert guest.budget.left == 0
    assert len(guest.writes(*range(10))) == 7


def test_what_cools_makes_room_for_others() -> None:
    guest = Guest(most=3)
    guest.writes(*range(3), times=5)
    guest.writes(*range(10, 20), times=IDLE + TIMES + 5)
    assert guest.unprotected <= set(range(10, 20))
    assert len(guest.unprotected) == 3


def test_all_blocks_share_one_bound() -> None:
    budget = Budget(2)
    blocks = [HotPages(PAGES, budget) for _ in range(3)]
    for epoch in range(HotPages.FIRST, HotPages.FIRST + 10):
        for block in blocks:
            block.learn(np.array([1, 2]), epoch)
    assert budget.left == 0
    assert sum(2 - len(block.cold(np.array([1, 2]))) for block in blocks) == 2


def test_pages_whose_change_is_unknown_count_as_changed() -> None:
    guest = Guest()
    guest.writes(7, times=5)
    for _ in range(3 * IDLE):
        guest.epoch += 1
        guest.hot_pages.on_sent(np.array([7]), guest.epoch)
        guest.hot_pages.learn(np.array([7]), guest.epoch)
    assert guest.hot_pages.cold(np.array([7])).tolist() == []


def test_it_goes_on_when_the_epochs_number_has_no_room_for_more() -> None:
    guest = Guest()
    guest.epoch = (1 << 32) - 5
    guest.writes(7, times=10)
    assert guest.writes(7, 9) == [9]
    assert guest.pauses_that_protect() == IDLE + 2
    guest.writes(7, times=10)
    assert guest.unprotected == {7}
