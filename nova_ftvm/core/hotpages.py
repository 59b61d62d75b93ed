"""Hot pages: which of the written pages stay unprotected, as they will be written again. PURE.

To protect a page costs an ioctl in the pause, and the guest one or two faults until it may write to it again. A page
that is left unprotected costs a copy in each pause, and a comparison after it. So a page that the guest writes in
almost every epoch is better left alone. That is safe by itself: a page that is not protected counts as written, and is
part of every epoch.

    protected --written, NEAR epochs after the last time, TIMES in a row--> hot
    hot       --no change in IDLE epochs----------------------------------> protected

Which pages changed is known where the changes are encoded (core/delta.py): `on_sent`. One object a RAM block; numbers
are its pages. Callers: host/memory.py.
"""

import numpy as np

#: A page is written often if no more than this number of epochs lies between two writes.
NEAR = 8
#: It is hot once that has been so this number of times in a row.
TIMES = 2
#: A hot page that did not change in this number of epochs is protected again.
IDLE = 16
#: Hot pages of one guest, at most: their copies take about 1 us each in every pause.
MOST = 1024


class Budget:
    """How many hot pages all blocks of a guest may still have."""

    def __init__(self, most: int = MOST) -> None:
        self.left = most


class HotPages:
    """Of one RAM block. In each epoch's pause `cold` tells what to protect; after it, `on_sent` tells what went to the
    backup, then `learn` what was found written. Epochs count from FIRST.
    """

    FIRST = NEAR + 1

    def __init__(self, pages: int, budget: Budget) -> None:
        self._budget = budget
        # Resident only where the guest writes: the kernel gives the memory when it is touched.
        self._last = np.zeros(pages, np.uint32)
        self._near = np.zeros(pages, np.uint8)
        self._hot = np.zeros(pages, np.bool_)

    def cold(self, numbers: np.ndarray) -> np.ndarray:
        """Of these pages, found written, those to be protected. numbers, result: ascending, int64."""
        return numbers[~self._hot[numbers]]

    def on_sent(self, numbers: np.ndarray, epoch: int) -> None:
        """These pages of the epoch went to the backup: they changed, or nobody knows whether they did."""
        hot = numbers[self._hot[numbers]]
        self._last[hot] = _stamp(epoch)

    def learn(self, numbers: np.ndarray, epoch: int) -> None:
        """All pages that were found written in the epoch; what becomes of them counts from the next one on."""
        is_hot = self._hot[numbers]
        if is_hot.any():
            self._cool(numbers[is_hot], epoch)
        self._heat(numbers[~is_hot], epoch)

    def _ago(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """Epochs since each was written. They are counted on a circle: a guest may be protected for years."""
        return _stamp(epoch) - self._last[numbers]

    def _heat(self, written: np.ndarray, epoch: int) -> None:
        is_near = self._ago(written, epoch) <= NEAR
        near = np.where(is_near, np.minimum(self._near[written] + 1, TIMES), 0).astype(np.uint8)
        self._near[written] = near
        self._last[written] = _stamp(epoch)
        admitted = written[near >= TIMES][:self._budget.left]
        self._hot[admitted] = True
        self._budget.left -= len(admitted)

    def _cool(self, hot: np.ndarray, epoch: int) -> None:
        idle = hot[self._ago(hot, epoch) > IDLE]
        self._hot[idle] = False
        self._near[idle] = 0
        self._budget.left += len(idle)


def _stamp(epoch: int) -> np.uint32:
    return np.uint32(epoch & 0xFFFFFFFF)
