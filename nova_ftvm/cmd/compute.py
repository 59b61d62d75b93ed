"""nova-ftvm-compute: nova-compute, where Nova's own folder cannot take the driver's door.

With an editable Nova (DevStack) nova/virt is a source tree, and this wheel's package nova/virt/ftvm lies elsewhere.
This script puts the same module in its place and starts nova-compute as it is.
"""

import sys


def main() -> None:
    # Nova patches its process while it is imported; nothing of ours that imports oslo may come first.
    from nova.cmd import compute

    from nova_ftvm.cloud import driver

    sys.modules["nova.virt.ftvm"] = driver
    compute.main()
