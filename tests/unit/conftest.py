"""What tests of several modules need."""

import pytest
from oslo_config import cfg
from oslo_messaging import transport


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    """A configuration whose broker is in this process."""
    made = cfg.ConfigOpts()
    made([], project="test", default_config_files=[])
    made.register_opts(transport._transport_opts)
    made.set_override("transport_url", "fake:/")
    return made
