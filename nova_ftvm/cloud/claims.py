"""Whose are the files of a server on this host? A claim says: a backup's, not yet the server's own.

A claim is a small file in the server's folder below [DEFAULT]instances_path, written before anything else of a standby
and taken away when Nova adopts the promoted guest. It outlives nova-compute, the domain and the host's power, and
needs neither the database nor the manager: what bears a claim may be cleaned up with its backup, what bears none never.
It names its host, so that a folder on shared storage is not taken for a standby's by the others.
"""

import dataclasses
import glob
import json
import os

from oslo_log import log

from nova_ftvm.cloud.settings import CONF
from nova_ftvm.types import InstanceId, PairId

LOG = log.getLogger(__name__)
_NAME = "ftvm-standby.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A standby's files and domain, by the server that they are a copy of."""

    instance_id: InstanceId
    backup_id: str
    pair_id: PairId
    host: str
    #: Its interfaces as they were plugged: nova.network.model.NetworkInfo as JSON.
    vifs: str


def _path(instance_id: str) -> str:
    return os.path.join(CONF.instances_path, instance_id, _NAME)


def stake(claim: Claim) -> None:
    """Writes the claim, whole or not at all, into the folder of the server, which is made if need be."""
    path = _path(claim.instance_id)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    draft = path + ".new"
    with open(draft, "w", encoding="utf-8") as target:
        json.dump(dataclasses.asdict(claim), target)
        target.flush()
        os.fsync(target.fileno())
    os.rename(draft, path)


def drop(instance_id: str) -> None:
    """From now on the files are the server's own."""
    try:
        os.unlink(_path(instance_id))
    except FileNotFoundError:
        LOG.debug("No claim on %s to drop", instance_id)


def of(instance_id: str, host: str) -> Claim | None:
    """The claim of this host on the server's files. A damaged claim is none: nothing is cleaned up by it."""
    try:
        with open(_path(instance_id), encoding="utf-8") as source:
            claim = Claim(**json.load(source))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        LOG.warning("The standby's claim on %s cannot be read, its files stay: %s", instance_id, error)
        return None
    return claim if claim.host == host and claim.instance_id == instance_id else None


def held(host: str) -> dict[InstanceId, Claim]:
    """Every claim of this host."""
    found = (of(os.path.basename(os.path.dirname(path)), host)
             for path in glob.glob(os.path.join(glob.escape(CONF.instances_path), "*", _NAME)))
    return {claim.instance_id: claim for claim in found if claim is not None}


def folder_exists(instance_id: str) -> bool:
    return os.path.exists(os.path.dirname(_path(instance_id)))
