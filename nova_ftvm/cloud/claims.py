"""Whose are the files of a server on this host? A claim says: a backup's, not yet the server's own.

A claim is a small file in the server's folder below [DEFAULT]instances_path, written before anything else of a standby
and taken away when Nova adopts the promoted guest. It outlives nova-compute, the domain and the host's power, and
needs neither the database nor the manager: what bears a claim may be cleaned up with its backup, what bears none never.
It names its host, so that a folder on shared storage is not taken for a standby's by the others. And it is only ever
written into a folder that did not exist: where hosts share their instances_path, the primary's folder is that one.
"""

import dataclasses
import glob
import json
import os
import shutil

from oslo_log import log

from nova_ftvm.cloud.settings import CONF
from nova_ftvm.exception import Unsupported
from nova_ftvm.types import InstanceId, PairId

LOG = log.getLogger(__name__)
_NAME = "ftvm-standby.json"
#: In the name of a folder that is being removed.
_GOING = "_ftvm_going_"


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
    """Makes the server's folder, and writes the claim into it, whole or not at all. Raises Unsupported, and has changed
    nothing, when there is such a folder already."""
    path = _path(claim.instance_id)
    folder = os.path.dirname(path)
    os.makedirs(CONF.instances_path, exist_ok=True)
    try:
        # One atomic step, on shared storage too: who makes the folder may remove it, and nobody else.
        os.mkdir(folder)
    except FileExistsError:
        raise Unsupported(
            f"files of server {claim.instance_id} are there already: either instances_path is shared, and its servers "
            "cannot be protected, or an evacuation left them, and a restart of nova-compute removes them") from None
    try:
        _write(path, claim)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(path: str, claim: Claim) -> None:
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
    claim = _read(_path(instance_id))
    return claim if claim is not None and claim.host == host and claim.instance_id == instance_id else None


def _read(path: str) -> Claim | None:
    try:
        with open(path, encoding="utf-8") as source:
            return Claim(**json.load(source))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        LOG.warning("The standby's claim %s cannot be read, the files beside it stay: %s", path, error)
        return None


def held(host: str) -> dict[InstanceId, Claim]:
    """Every claim of this host."""
    found = (of(os.path.basename(os.path.dirname(path)), host)
             for path in glob.glob(os.path.join(glob.escape(CONF.instances_path), "*", _NAME)))
    return {claim.instance_id: claim for claim in found if claim is not None}


def remove_files(claim: Claim) -> None:
    """Removes the folder with all that is in it, if it bears this very claim; otherwise nothing.

    It is moved away and looked at once more there, where nobody else writes: between a look and the removal under its
    own name it could have become the server's.
    """
    path = _path(claim.instance_id)
    folder = os.path.dirname(path)
    going = f"{folder}{_GOING}{os.urandom(4).hex()}"
    if _read(path) != claim:
        return
    os.rename(folder, going)
    if _read(os.path.join(going, _NAME)) != claim:
        os.rename(going, folder)
        return
    _empty(going)


def remove_leftovers(host: str) -> None:
    """Ends removals of this host that were interrupted."""
    for path in glob.glob(os.path.join(glob.escape(CONF.instances_path), f"*{_GOING}*", _NAME)):
        claim = _read(path)
        if claim is not None and claim.host == host:
            _empty(os.path.dirname(path))


def _empty(folder: str) -> None:
    """The claim goes last: whoever is interrupted leaves what can be told to be nobody's."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _NAME:
            os.unlink(entry.path)
    shutil.rmtree(folder)
