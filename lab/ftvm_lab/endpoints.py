"""How the lab's programs reach each other: URLs, the message bus, the databases."""

from dataclasses import dataclass

from ftvm_lab.ini import Section
from ftvm_lab.layout import CONTROL, MGMT, PASSWORD, REGION, Layout

CONTROL_ADDRESS = CONTROL.address(MGMT)
AUTH_URL = f"http://{CONTROL_ADDRESS}:5000/v3"
TRANSPORT_URL = f"rabbit://guest:guest@{CONTROL_ADDRESS}:5672/"
RABBIT_PORT = 5672


@dataclass(frozen=True, slots=True)
class Api:
    """A service with an API: its WSGI module, and its entry in the catalogue."""

    name: str
    port: int
    module: str
    type: str
    path: str = ""

    @property
    def url(self) -> str:
        return f"http://{CONTROL_ADDRESS}:{self.port}{self.path}"


KEYSTONE = Api("keystone", 5000, "keystone.wsgi.api", "identity", "/v3")
PLACEMENT = Api("placement", 8778, "placement.wsgi.api", "placement")
GLANCE = Api("glance", 9292, "glance.wsgi.api", "image")
NOVA = Api("nova", 8774, "nova.wsgi.osapi_compute", "compute", "/v2.1")
NEUTRON = Api("neutron", 9696, "neutron.wsgi.api", "network")
APIS = (KEYSTONE, PLACEMENT, GLANCE, NOVA, NEUTRON)


def database_url(layout: Layout, database: str) -> str:
    socket = layout.sockets / "mysql.sock"
    return f"mysql+pymysql://root@localhost/{database}?unix_socket={socket}&charset=utf8"


def credentials(username: str) -> Section:
    """A service's own account, as keystoneauth's loading options."""
    return {
        "auth_type": "password",
        "auth_url": AUTH_URL,
        "username": username,
        "password": PASSWORD,
        "project_name": "service",
        "user_domain_id": "default",
        "project_domain_id": "default",
        "region_name": REGION,
    }


def token_check(username: str) -> Section:
    """[keystone_authtoken] of a service that checks its callers' tokens."""
    return {
        "www_authenticate_uri": AUTH_URL,
        **credentials(username),
        "service_token_roles": "service",
        "service_token_roles_required": "true",
        "token_cache_time": 300,
    }
