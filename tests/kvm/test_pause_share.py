"""[engine] max_pause_percent, held against what a guest's own clock lost: both engines as processes, QEMU's TCG.

The bound is kept by QEMU's virtual clock, so it holds on a busy machine as well, where a checkpoint costs that clock
much more than the pause that QEMU tells of.
"""

import time
from collections.abc import Callable

from nova_ftvm.core.policy import AHEAD_S
from nova_ftvm.core.virtualclock import virtual_clock_ns
from tests.host.machine import Qemu
from tests.host.protection import protected
from tests.kvm import clocks, machine
from tests.kvm.checkpoints import Checkpoints
from tests.kvm.clocks import EPOCH_S, Clocks

Launch = Callable[..., Qemu]

PERCENT, WINDOW_S = 8.0, 10.0
#: One loss of this is more than any that was seen, s.
LONGEST_S = 0.03
#: The guest looks at its clocks, and is looked at: so much of the window.
SLACK = 0.001


def start(launch: Launch, name: str, standby: bool = False) -> Qemu:
    return launch(name, clocks.rom(kvmclock=False), accel=machine.TCG, standby=standby)


def test_a_guests_own_clock_loses_no_more_than_the_bound_and_the_figure_says_what(launch: Launch) -> None:
    qemu = start(launch, "p")
    guest = Clocks(qemu)
    guest.await_start()
    settings = {"policy": "fixed", "epoch_ms": 1.0, "max_pause_percent": PERCENT}
    with protected(qemu, start(launch, "b", standby=True), **settings) as pair:
        first = guest.at_tick()
        time.sleep(WINDOW_S)
        lost = 1 - clocks.shares(first, guest.at_tick())["tsc"]
        while pair.primary.heard("figures"):
            pass
        figures = pair.primary.hear("figures")
    share = PERCENT / 100
    assert lost <= share + (share * AHEAD_S + (1 - share) * LONGEST_S) / WINDOW_S + SLACK
    assert lost > 0.75 * share, "else the bound is not what was tried"
    assert abs(figures["paused_percent"] / 100 - lost) < 0.005, (figures, lost)


def test_the_virtual_clock_in_the_state_is_the_guests_clock(launch: Launch) -> None:
    qemu = start(launch, "p")
    guest = Clocks(qemu)
    guest.await_start()
    checkpoints = Checkpoints(qemu)
    try:
        before, first = guest.at_tick(), virtual_clock_ns(checkpoints.take().state)
        checkpoints.run(2.0, EPOCH_S)
        after, last = guest.at_tick(), virtual_clock_ns(checkpoints.take().state)
    finally:
        checkpoints.close()
    assert first is not None and last is not None
    counted_s = (after.tsc - before.tsc) / clocks.tsc_hz()
    assert abs((last - first) / 1e9 - counted_s) < 0.02
    assert counted_s < 0.98 * (after.at_s - before.at_s), "or nothing was lost, and the test shows nothing"
