"""The control plane's services: APIs under uWSGI, Nova's workers, the manager."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial

from ftvm_lab import databases
from ftvm_lab.command import LabError, wait_until
from ftvm_lab.endpoints import GLANCE, KEYSTONE, NEUTRON, NOVA, PLACEMENT, Api
from ftvm_lab.ftvm_settings import MANAGERS, manager_file
from ftvm_lab.layout import BACKGROUND, Layout
from ftvm_lab.machine import Machine

MANAGER = MANAGERS[0]
SERVICES = (
    *(databases.RABBIT, databases.MARIADB, "keystone", "placement", "glance", "neutron", "nova"),
    *("nova-conductor", "nova-scheduler"),
)
API_TIMEOUT_S = 90


def make_directories(layout: Layout) -> None:
    for directory in (layout.conf, layout.log, layout.sockets):
        directory.mkdir(parents=True, exist_ok=True)
    for name in ("nova", "neutron", "glance/images", "glance/tasks", "glance/staging"):
        (layout.state / name).mkdir(parents=True, exist_ok=True)


def start_apis(control: Machine, apis: Iterable[Api]) -> None:
    conf = control.layout.conf
    for api in apis:
        control.start(
            api.name,
            [str(control.layout.venv / "bin/uwsgi"), "--ini", f"{conf}/uwsgi/{api.name}.ini"],
            niceness=BACKGROUND,
            environment=_configuration(control.layout),
        )


def _configuration(layout: Layout) -> dict[str, str]:
    """Where the WSGI modules look for their files."""
    return {
        "OS_KEYSTONE_CONFIG_DIR": f"{layout.conf}/keystone",
        "OS_PLACEMENT_CONFIG_DIR": f"{layout.conf}/placement",
        "OS_GLANCE_CONFIG_DIR": f"{layout.conf}/glance",
        "OS_NOVA_CONFIG_DIR": f"{layout.conf}/nova",
        "OS_NOVA_CONFIG_FILES": f"{layout.venv}/etc/nova/api-paste.ini;nova.conf",
        "OS_NEUTRON_CONFIG_DIR": f"{layout.conf}/neutron",
        "OS_NEUTRON_CONFIG_FILES": "neutron.conf;ml2.ini",
    }


def start_nova_workers(control: Machine) -> None:
    layout = control.layout
    for service in ("nova-conductor", "nova-scheduler"):
        control.start(
            service,
            [
                *(str(layout.venv / "bin" / service), "--config-file"),
                *(f"{layout.conf}/nova/nova.conf", "--log-file", f"{layout.log}/{service}.log"),
            ],
            niceness=BACKGROUND,
        )


def start_manager(control: Machine, name: str = MANAGER) -> None:
    """Its tables first, if it is the first one."""
    layout = control.layout
    file = str(manager_file(layout, name))
    if name == MANAGER:
        control.call(["nova-ftvm-manage", "--config-file", file, "db", "sync"])
    control.start(name, [str(layout.venv / "bin" / MANAGER), "--config-file", file])


#: The services whose loss is a fault of its own, and how they are started again.
STARTERS: dict[str, Callable[[Machine], None]] = {
    databases.RABBIT: databases.start_rabbit,
    databases.MARIADB: databases.start_mariadb,
    **{name: partial(start_manager, name=name) for name in MANAGERS},
}


def start(control: Machine, service: str) -> None:
    """Starts one of STARTERS; returns when it can be used."""
    STARTERS[service](control)
    if service not in MANAGERS:
        databases.wait(control)


def wait_for_apis(control: Machine, apis: Iterable[Api]) -> None:
    """Must be called inside the control namespace."""
    for api in apis:
        wait_until(f"{api.name}'s API", partial(_answers, control, api), API_TIMEOUT_S)


def _answers(control: Machine, api: Api) -> bool:
    """True for any answer, also an error: the application is loaded then."""
    if not control.runs(api.name):
        raise LabError(f"{api.name} ended: see {control.layout.log}/{api.name}.out")
    try:
        urllib.request.urlopen(api.url, timeout=20).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


OTHER_APIS = (PLACEMENT, GLANCE, NEUTRON, NOVA)
ALL_APIS = (KEYSTONE, *OTHER_APIS)


def load_metadefs(control: Machine) -> bool:
    """Puts the product's definitions into Glance; False if there are none installed."""
    layout = control.layout
    if not layout.metadefs.is_dir():
        return False
    config = f"{layout.conf}/glance/glance-api.conf"
    control.call(
        [
            *("glance-manage", "--config-file", config, "db", "load_metadefs"),
            *("--path", str(layout.metadefs), "--merge", "--overwrite"),
        ]
    )
    return True
