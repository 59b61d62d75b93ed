"""Configuration, one module a group.

Nothing reads a global: cmd/ builds a ConfigOpts, registers what the service needs and passes values on.
The driver and the filter live in Nova's processes, and find their one group, [ftvm], in nova.conf.
"""
