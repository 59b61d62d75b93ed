"""MariaDB, RabbitMQ and the manager as real processes, all of them private.

The whole benchmark runs in a network and a PID namespace of its own (`in_namespaces`): its ports clash with nobody's,
and nothing that it started outlives it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from oslo_config import cfg

_INSIDE = "FTVM_BENCH_MANAGER_INSIDE"
RABBIT_PORT, CLOUD_PORT = 5672, 8774
TRANSPORT_URL = f"rabbit://guest:guest@127.0.0.1:{RABBIT_PORT}/"
_START_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


def in_namespaces(module: str) -> None:
    """Returns inside the namespaces only; the process that called it from outside ends with the inner one's code."""
    if _INSIDE in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    if os.geteuid() != 0:
        sys.exit("the benchmark makes namespaces: run it as root")
    argv = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
            sys.executable, "-m", module, *sys.argv[1:]]
    sys.exit(subprocess.run(argv, env={**os.environ, _INSIDE: "1"}).returncode)


def wait_for(what: str, probe: Callable[[], bool], limit_s: float = _START_S, every_s: float = 0.2) -> None:
    end = time.monotonic() + limit_s
    while not probe():
        if time.monotonic() > end:
            sys.exit(f"waited {limit_s:g} s in vain for {what}")
        time.sleep(every_s)


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


class Daemon:
    """A process with its output in a file, and its processor time."""

    def __init__(self, name: str, argv: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None,
                 **pipes: int) -> None:
        self.log = folder / f"{name}.out"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                list(argv), env={**os.environ, **(environment or {})}, start_new_session=True,
                **{"stdin": subprocess.DEVNULL, "stdout": output, **pipes}, stderr=output)

    def cpu_s(self) -> float:
        """User and system seconds of all processes of its session."""
        return sum(_cpu_s(pid) for pid in _session(self.process.pid))

    def rss_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _session(leader: int) -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _stat(int(name), 3) == leader]


def _cpu_s(pid: int) -> float:
    return (_stat(pid, 11) + _stat(pid, 12)) / _TICKS


def _stat(pid: int, field: int) -> int:
    """A number of /proc/PID/stat, counted from the state on; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def mariadb(folder: Path) -> tuple[Daemon, str]:
    """With its own defaults, so that each commit waits for the disk; and the URL of an empty database."""
    files = folder / "mysql"
    subprocess.run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={files}", "--skip-test-db",
                    "--auth-root-authentication-method=normal"], check=True, stdout=subprocess.DEVNULL)
    end = folder / "mysql.sock"
    daemon = Daemon("mariadb", ["/usr/sbin/mariadbd", "--no-defaults", "--user=root", f"--datadir={files}",
                                f"--socket={end}", "--skip-networking", "--max-connections=500"], folder)
    client = ["mariadb", "--no-defaults", "-uroot", f"--socket={end}", "-e"]

    def created() -> bool:
        done = subprocess.run([*client, "create database if not exists ftvm character set utf8mb3"],
                              capture_output=True)
        return done.returncode == 0
    wait_for("MariaDB", created)
    return daemon, f"mysql+pymysql://root@localhost/ftvm?unix_socket={end}&charset=utf8"


def rabbitmq(folder: Path) -> Daemon:
    home = folder / "rabbit"
    home.mkdir()
    (home / "enabled_plugins").write_text("[].\n")
    (home / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{RABBIT_PORT}\nlog.file.level = warning\n")
    (home / "env.conf").write_text(
        f"NODENAME=rabbit@localhost\nMNESIA_BASE={home}/mnesia\nLOG_BASE={home}\nCONFIG_FILE={home}/rabbitmq\n"
        f"ENABLED_PLUGINS_FILE={home}/enabled_plugins\nPID_FILE={home}/pid\n"
        'SERVER_ADDITIONAL_ERL_ARGS="+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"\n')
    daemon = Daemon("rabbitmq", ["/usr/lib/rabbitmq/bin/rabbitmq-server"], folder,
                    {"HOME": str(home), "RABBITMQ_CONF_ENV_FILE": str(home / "env.conf")})
    wait_for("RabbitMQ", lambda: listens(RABBIT_PORT))
    return daemon


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def manager(folder: Path, database: str, options: Iterable[str] = ()) -> Daemon:
    """nova-ftvm-manager as installed, with its defaults, but that it makes no new backups: the figures of a failover
    are to be those of the failover. The cloud is cloud_api.py's. options: GROUP.OPTION=VALUE."""
    settings = {
        "DEFAULT": ["host = control", f"transport_url = {TRANSPORT_URL}", f"log_file = {folder / 'manager.log'}"],
        "database": [f"connection = {database}"], "manager": ["repair = false"],
        "service_auth": ["auth_type = password", f"auth_url = http://127.0.0.1:{CLOUD_PORT}/v3", "username = ftvm",
                         "password = x", "project_name = service", "user_domain_id = default",
                         "project_domain_id = default", "region_name = R"]}
    for option in options:
        group, _, setting = option.partition(".")
        settings.setdefault(group, []).append(setting)
    file = folder / "manager.conf"
    file.write_text("".join(f"[{group}]\n" + "\n".join(lines) + "\n" for group, lines in settings.items()))
    daemon = Daemon("manager", [sys.executable, "-m", "nova_ftvm.cmd.manager", "--config-file", str(file)], folder)
    log = folder / "manager.log"
    wait_for("the manager", lambda: log.exists() and "manager runs" in log.read_text(errors="replace"))
    return daemon


def configuration(folder: Path) -> cfg.ConfigOpts:
    """For whoever speaks to the broker besides the manager. The pool is large, as each agent has its own in life."""
    file = folder / "broker.conf"
    file.write_text(f"[DEFAULT]\ntransport_url = {TRANSPORT_URL}\n[oslo_messaging_rabbit]\nrpc_conn_pool_size = 100\n")
    conf = cfg.ConfigOpts()
    conf(["--config-file", str(file)], project="bench-manager")
    return conf
