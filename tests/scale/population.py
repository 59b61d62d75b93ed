"""The pairs of the benchmark: who is where. PURE; rows, cloud and agents are all made from it."""

import dataclasses
import uuid
from typing import Any

#: Pairs whose primary is on one host; as many backups are there.
PER_HOST = 20
#: Hosts that die together; none of them holds the backup of another one's primary.
DYING = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One pair, and the names of what belongs to it."""

    number: int
    primary_host: str
    backup_host: str

    def _id(self, what: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{what} {self.number}"))

    @property
    def pair_id(self) -> str:
        return self._id("pair")

    @property
    def instance_id(self) -> str:
        return self._id("instance")

    @property
    def backup_id(self) -> str:
        return self._id("backup")

    @property
    def port_id(self) -> str:
        return self._id("port")

    def engine(self, role: str) -> dict[str, Any]:
        return {"pair_id": self.pair_id, "instance_id": self.instance_id, "role": role, "generation": 1,
                "state": "protected"}


def host_name(number: int) -> str:
    return f"compute{number:04d}"


def members(pairs: int) -> list[Member]:
    """Spread evenly: each host has PER_HOST primaries and as many backups."""
    hosts = max(2, -(-pairs // PER_HOST))
    near = DYING if hosts >= 2 * DYING else 1
    return [Member(number, host_name(number // PER_HOST),
                   host_name((number // PER_HOST + near + number % PER_HOST % (hosts - 2 * near + 1)) % hosts))
            for number in range(pairs)]


def hosts_of(population: list[Member]) -> list[str]:
    return sorted({host for member in population for host in (member.primary_host, member.backup_host)})


def dying(population: list[Member]) -> list[str]:
    """The first hosts; none if there are too few for it."""
    names = hosts_of(population)
    return names[:DYING] if len(names) >= 2 * DYING else []
