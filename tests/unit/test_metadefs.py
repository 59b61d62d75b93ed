"""etc/metadefs: Glance takes them, and they name the keys that the code reads."""

import json
import pathlib

import pytest
import sqlalchemy
from glance.api.v2 import metadef_namespaces
from glance.db.sqlalchemy import metadata as loader
from glance.db.sqlalchemy import models_metadef

from nova_ftvm.core import request
from nova_ftvm.core.policy import Policy

FOLDER = pathlib.Path(__file__).parents[2] / "etc" / "metadefs"
SERVER, FLAVOR = FOLDER / "ftvm-server.json", FOLDER / "ftvm-flavor.json"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [SERVER, FLAVOR], ids=lambda path: path.name)
def test_glances_api_would_take_the_namespace(path):
    metadef_namespaces.get_schema().validate(read(path))


def test_every_file_of_the_folder_is_tested_here():
    assert set(FOLDER.glob("*.json")) == {SERVER, FLAVOR}


def test_the_servers_properties_are_those_that_are_read():
    namespace = read(SERVER)
    assert {name: set(what.get("enum", ())) for name, what in namespace["properties"].items()} == {
        request.METADATA_KEY: set(), request.POLICY_KEY: set(Policy), request.VIRTIO_KEY: set(request.Virtio)}
    assert namespace["resource_type_associations"] == [{"name": "OS::Nova::Server", "properties_target": "metadata"}]


def test_the_flavors_property_is_the_one_that_is_read():
    namespace = read(FLAVOR)
    (association,) = namespace["resource_type_associations"]
    assert [association["prefix"] + name for name in namespace["properties"]] == [request.EXTRA_SPEC_KEY]
    assert association["name"] == "OS::Nova::Flavor"


def test_glance_manage_loads_both_and_a_second_time_changes_nothing(tmp_path):
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path}/glance.sqlite")
    models_metadef.register_models(engine)
    counts = []
    for _ in range(2):
        loader.db_load_metadefs(engine, metadata_path=str(FOLDER))
        with engine.connect() as connection:
            counts.append([connection.execute(sqlalchemy.text(f"select count(*) from {table}")).scalar()
                           for table in ("metadef_namespaces", "metadef_properties",
                                         "metadef_namespace_resource_types")])
    assert counts == [[2, 4, 2], [2, 4, 2]]
