"""The engine's process as cmd/engine.py makes it; it ends at once, and does not wait for an agent."""

import logging
import sys

from nova_ftvm.cmd import engine
from nova_ftvm.exception import FtvmError
from nova_ftvm.host.control import ControlServer
from nova_ftvm.types import Role


def main() -> int:
    order = engine.Order.parse(sys.stdin.readline())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    control = ControlServer(order.path(f"{order.role.value}.ctl"), {
        "role": order.role.value, "pair_id": order.pair_id, "generation": order.generation,
        "instance_id": order.instance_id})
    try:
        if order.role is Role.PRIMARY:
            return engine.run_primary(order, control)
        return engine.run_backup(order, control)
    except FtvmError as error:
        logging.error("%s", error)
        control.report("failed", reason=str(error))
        return engine.FAILED
    finally:
        control.close()


if __name__ == "__main__":
    sys.exit(main())
