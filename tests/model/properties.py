"""What must never be seen, and what must always be possible. Judged from outside: by what leaves the guests."""

from collections.abc import Callable, Iterator
from typing import Any

from nova_ftvm.types import PairState
from tests.model.world import HOSTS, OTHER, Host, Step, World

ONE_VOICE = "only one side speaks"
WHOLE = "only a whole committed epoch is promoted, and it includes all that was said"
COVERED = "nothing is said before the backup holds it, or nobody can be promoted any more"
PLANNED = "nothing is promoted after a planned end"
HARMLESS = "a guest that has the voice is never destroyed"
PROGRESS = "somebody can always speak again without a hand"
ENDED = "a guest whose voice went elsewhere is ended without a hand"


def wrong(world: World, step: Step) -> str | None:
    """The first claim that the step breaks, with what breaks it."""
    for said in _broken(world, step):
        return said
    return None


def _broken(world: World, step: Step) -> Iterator[str]:
    for what, *facts in step.events:
        judged = _EVENTS[what](world, step.world, *facts)
        if judged:
            yield judged
    if step.world.row is not world.row or step.world.a is not world.a or step.world.b is not world.b:
        yield from _standing(step.world)


def _standing(world: World) -> Iterator[str]:
    """What must hold at rest."""
    speaking = [name for name in HOSTS if speaks(world.host(name))]
    if len(speaking) == 2:
        yield f"{ONE_VOICE}: both guests do"
    for name in speaking:
        if world.row.active_host != name:
            yield f"{ONE_VOICE}: {name}'s guest does, and the voice is {OTHER[name]}'s"
        elif world.row.state is PairState.PROTECTED:
            yield f"{COVERED}: {name}'s guest is not held, and its backup may be promoted"


def _released(before: World, after: World, name: str, generation: int, epoch: int) -> str | None:
    seen = after.seen
    if generation != seen.generation:
        return f"{ONE_VOICE}: {name} releases output of generation {generation} after {seen.generation} has begun"
    if seen.promoted not in ("", name) and epoch > seen.promoted_epoch:
        return f"{ONE_VOICE}: {name} releases epoch {epoch}, and epoch {seen.promoted_epoch} was promoted"
    if epoch > seen.whole:
        return f"{COVERED}: epoch {epoch} is released, and the backup holds {seen.whole}"
    return None


def _opened(before: World, after: World, name: str) -> str | None:
    row = after.row
    if row.active_host != name:
        return f"{ONE_VOICE}: {name} lets its output go, and the voice is {row.active_host}'s"
    if row.state in (PairState.PROTECTED, PairState.PROMOTING):
        return f"{COVERED}: {name} lets its output go, and its backup may be promoted"
    return None


def _promoted(before: World, after: World, name: str, generation: int, epoch: int, state_of: int) -> str | None:
    seen = after.seen
    if before.seen.disarmed:
        return f"{PLANNED}: {name} is promoted after the pair was disarmed"
    if not epoch or state_of != epoch:
        return f"{WHOLE}: {name} is promoted with RAM of epoch {epoch} and devices of epoch {state_of}"
    if generation != seen.generation or epoch < seen.said:
        return f"{WHOLE}: {name} is promoted with epoch {epoch}, and epoch {seen.said} was said"
    if after.row.active_host != name:
        return f"{ONE_VOICE}: {name} is promoted, and the voice is {after.row.active_host}'s"
    return None


def _destroyed(before: World, after: World, name: str) -> str | None:
    return f"{HARMLESS}: {name}'s is" if after.row.active_host == name else None


_EVENTS: dict[str, Callable[..., str | None]] = {
    "released": _released, "opened": _opened, "promoted": _promoted, "destroyed": _destroyed}


def speaks(host: Host) -> bool:
    return host.guest is not None and host.guest.speaks


def _is_ended(world: World) -> bool:
    """No guest is left that must be silent for ever."""
    return not any(guest and not guest.standby and world.row.active_host != name
                   for name, guest in ((name, world.host(name).guest) for name in HOSTS))


def _is_spoken_for(world: World) -> bool:
    """Somebody speaks, or nobody is left who could."""
    return _is_heard(world) or _is_excused(world)


def _is_heard(world: World) -> bool:
    """The guest says what it wants, or has said what its backup has acknowledged."""
    for name in HOSTS:
        host: Any = world.host(name)
        if speaks(host):
            return True
        if host.guest and host.guest.held and host.primary and host.primary.loop.rule.phase.name == "RUNNING":
            return True
    return False


def _is_excused(world: World) -> bool:
    """No copy is left that may speak: the guest was shut down, or was lost with the voice."""
    row, seen = world.row, world.seen
    if seen.off or row.state is PairState.ERROR:
        return True
    voice = world.host(row.active_host)
    if voice.guest is not None and not voice.guest.standby:
        return False
    standby = world.host(row.backup_host) if row.backup_host else None
    return not (row.state in (PairState.PROTECTED, PairState.PROMOTING) and standby and standby.backup
                and not standby.backup.done and standby.backup.replica.rule.committed)


GOALS = {PROGRESS: _is_spoken_for, ENDED: _is_ended}
