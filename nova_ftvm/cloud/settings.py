"""[ftvm] of nova.conf, registered in Nova's own configuration object. Importing it is enough."""

import nova.conf

from nova_ftvm.conf import nova as options

CONF = nova.conf.CONF
options.register(CONF)
