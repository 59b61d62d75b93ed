"""The control path's wires: who may be called, with what, and what comes back.

Two services: the manager (topic ftvm_manager, any of them) and the agents (topic ftvm_agent, one a compute host).
The classes here are the callers' side; the servers' side implements the protocol of the same name.
Only JSON-like values cross: str, int, float, bool, None, list, dict.
"""
