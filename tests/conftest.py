"""One way to run threads for every test of a run: native ones, as our services do.

Nova decides at its first import, and refuses to change its mind once eventlet has been imported by anybody; so this
stands before the first import of any test. Without Nova (the agent needs none) there is nothing to decide.
"""

import os

os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")

try:
    from nova import monkey_patch
except ImportError:
    pass
else:
    monkey_patch.patch(backend="threading")
