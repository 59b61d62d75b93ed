"""The manager and the agents as fakes of their RPC contract, on oslo.messaging's in-process transport.

They answer what the tests tell them to; the driver calls them through the real clients. The rows of the pairs, and the
arbiter that moves them, are the real ones.
"""

import fixtures
import oslo_messaging

from nova_ftvm.core import domain
from nova_ftvm.db import connect
from nova_ftvm.db.store import Store
from nova_ftvm.exception import LostRace
from nova_ftvm.failover.arbiter import Arbiter
from nova_ftvm.failover.settings import Settings, SystemClock
from nova_ftvm.rpc import common


class FakeManager:
    """Endpoint of ManagerApi. Plans and adoptions are set by the test, and pairs put into the store. A server without
    a row can always be disarmed, unless the test says otherwise."""

    def __init__(self, folder):
        engine = connect.engine_for(f"sqlite:///{folder}/pairs.sqlite")
        connect.sync(engine)
        self.store = Store(engine)
        self._arbiter = Arbiter(self.store, SystemClock(), Settings())
        self.plans = {}
        self.promoted_on = {}
        self.ready = []
        self.disarmed = []
        self.disarms = True
        self.grants = True

    def standby_plan(self, context, backup_id, host):
        return self.plans.get(backup_id)

    def standby_ready(self, context, pair_id, generation, host, failure, lasting=False):
        self.ready.append((pair_id, generation, host, failure))
        return {"granted": self.grants, "generation": generation, "reason": "" if self.grants else "too late"}

    def disarm(self, context, instance_id, reason):
        self.disarmed.append((instance_id, reason))
        pair = self.store.pair_of(instance_id)
        try:
            return {"disarmed": self.disarms and (pair is None or bool(self._arbiter.disarm(pair, reason)))}
        except LostRace as error:
            return {"disarmed": False, "reason": str(error)}

    def adoption(self, context, instance_id, host):
        return {"adopt": self.promoted_on.get(instance_id) == host, "pair_id": None, "generation": 1}


class FakeAgent:
    """Endpoint of AgentApi on one host; `connection` is that host's libvirt."""

    def __init__(self, connection):
        self._connection = connection
        self.capable = True
        #: What the host's KVM can; None: the agent is too old to tell.
        self.abilities = None
        self.promoted = set()

    def prepare_domain(self, context, instance_id):
        return {"monitor": f"/run/nova-ftvm/{instance_id}/monitor", "capable": self.capable,
                "reason": "" if self.capable else "the kernel is too old",
                **({} if self.abilities is None else {"abilities": self.abilities.told()})}

    def discard_standby(self, context, instance_id):
        if instance_id in self.promoted:
            return {"discarded": False}
        for found in list(self._connection._vms.values()):
            if found.UUIDString() == instance_id and domain.standby_mark(found.XMLDesc(0)):
                found.destroy()
                return {"discarded": True}
        return {"discarded": False}


class FtvmServices(fixtures.Fixture):
    """Starts and stops the fakes on their topics."""

    def __init__(self, conf):
        super().__init__()
        self._transport = oslo_messaging.get_rpc_transport(conf)
        self._servers = {}
        self.agents = {}

    def _setUp(self):
        self.manager = FakeManager(self.useFixture(fixtures.TempDir()).path)
        self.addCleanup(self.stop_all)

    def start_manager(self):
        self._serve("manager", common.MANAGER_TOPIC, "any", self.manager)

    def start_agent(self, host, connection):
        self.agents[host] = FakeAgent(connection)
        self._serve(host, common.AGENT_TOPIC, host, self.agents[host])

    def _serve(self, name, topic, server, endpoint):
        target = oslo_messaging.Target(exchange=common.EXCHANGE, topic=topic, server=server)
        endpoint.target = oslo_messaging.Target(version=common.VERSION)
        self._servers[name] = oslo_messaging.get_rpc_server(self._transport, target, [endpoint], executor="threading")
        self._servers[name].start()

    def stop(self, name):
        server = self._servers.pop(name)
        server.stop()
        server.wait()

    def stop_all(self):
        for name in list(self._servers):
            self.stop(name)
