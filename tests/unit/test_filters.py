"""cloud/filters.py: its rules, with the database replaced. tests/functional runs it in a real scheduler."""

import types

import pytest
from nova import exception, objects

from nova_ftvm.cloud import filters
from nova_ftvm.cloud.settings import CONF

objects.register_all()
SERVICE, USER, PRIMARY = "service-project", "user-project", "11111111-2222-3333-4444-555555555555"


class Database:
    """What the filter reads, and how often it asked."""

    def __init__(self):
        self.host = "alpha"
        self.backups = []
        self.moves = []
        self.unknown = False
        self.asked = 0

    def in_its_cell(self, server, question):
        self.asked += 1
        if self.unknown:
            raise exception.InstanceNotFound(instance_id=server)
        return question(None)


@pytest.fixture
def database(monkeypatch):
    made = Database()
    CONF.set_override("service_project_id", SERVICE, group="ftvm")
    monkeypatch.setattr(filters, "_in_its_cell", made.in_its_cell)
    monkeypatch.setattr(objects, "Instance", types.SimpleNamespace(
        get_by_uuid=lambda context, uuid: types.SimpleNamespace(host=made.host)))
    monkeypatch.setattr(objects, "InstanceList", types.SimpleNamespace(
        get_by_filters=lambda context, asked, expected_attrs: made.backups
        if asked["metadata"] == {"ftvm:primary": PRIMARY} and asked["project_id"] == SERVICE else []))
    monkeypatch.setattr(objects, "MigrationList", types.SimpleNamespace(
        get_by_filters=lambda context, asked: made.moves
        if asked == {"instance_uuid": PRIMARY, "migration_type": "live-migration", "status": "accepted"} else []))
    yield made
    CONF.clear_override("service_project_id", group="ftvm")


def spec(project=SERVICE, rebuild=False, **hints):
    hints = {key.replace("_", ":"): value for key, value in hints.items()}
    if rebuild:
        hints["_nova_check_type"] = ["rebuild"]
    return objects.RequestSpec(project_id=project, instance_uuid=PRIMARY, scheduler_hints=hints)


def backup(host, **metadata):
    return types.SimpleNamespace(host=host, metadata={key.replace("_", ":"): value for key, value in metadata.items()})


def passing(request, hosts=("alpha", "beta", "gamma")):
    states = [types.SimpleNamespace(host=host) for host in hosts]
    return [state.host for state in filters.FaultToleranceFilter().filter_all(states, request)]


@pytest.mark.parametrize("listed", [["beta", "alpha"], ['["beta", "alpha"]']])
def test_a_backup_goes_to_listed_hosts_but_its_primarys(database, listed):
    assert passing(spec(ftvm_primary=[PRIMARY], ftvm_hosts=listed)) == ["beta"]


def test_a_backup_without_a_list_goes_anywhere_but_to_its_primary(database):
    assert passing(spec(ftvm_primary=[PRIMARY])) == ["beta", "gamma"]


@pytest.mark.parametrize("state", ["unknown", "unplaced"])
def test_a_backup_of_no_server_goes_nowhere(database, state):
    database.unknown, database.host = state == "unknown", None
    assert passing(spec(ftvm_primary=[PRIMARY])) == []


def test_a_users_hint_means_nothing(database):
    assert passing(spec(project=USER, ftvm_primary=["other"], ftvm_hosts=["nowhere"])) == ["alpha", "beta", "gamma"]


def test_a_server_of_the_service_project_without_a_hint_is_ordinary(database):
    assert passing(spec()) == ["alpha", "beta", "gamma"]
    assert database.asked == 0


def test_a_moving_server_avoids_its_backup(database):
    database.backups = [backup("beta", ftvm_primary=PRIMARY)]
    assert passing(spec(project=USER)) == ["alpha", "gamma"]


def test_a_moving_server_may_join_its_promoted_backup(database):
    database.backups = [backup("beta", ftvm_role="promoted"), backup("gamma"), backup(None)]
    assert passing(spec(project=USER)) == ["alpha", "beta"]


def test_a_live_migration_to_the_backups_host_by_name_is_a_switchover(database):
    database.backups = [backup("beta"), backup("gamma")]
    asked = spec(project=USER)
    asked.requested_destination = objects.Destination(host="beta")
    assert passing(asked) == ["alpha"]
    database.moves = ["a live migration"]
    assert passing(asked) == ["alpha", "beta"]
    assert passing(spec(project=USER)) == ["alpha"]


def test_a_server_that_is_just_made_goes_anywhere(database):
    database.unknown = True
    assert passing(spec(project=USER)) == ["alpha", "beta", "gamma"]


def test_the_database_is_asked_once_a_request(database):
    passing(spec(project=USER), hosts=[f"host{number}" for number in range(50)])
    assert database.asked == 1


def test_a_rebuild_stays_where_it_is(database):
    database.backups = [backup("alpha")]
    assert passing(spec(project=USER, rebuild=True)) == ["alpha", "beta", "gamma"]
    assert database.asked == 0


def test_without_a_service_project_nothing_is_asked(database):
    CONF.set_override("service_project_id", None, group="ftvm")
    assert passing(spec(project=None, ftvm_primary=[PRIMARY])) == ["alpha", "beta", "gamma"]
    assert database.asked == 0


def test_a_hint_that_only_looks_like_json_is_a_name(database):
    assert passing(spec(ftvm_primary=[PRIMARY], ftvm_hosts=["[beta"])) == []
