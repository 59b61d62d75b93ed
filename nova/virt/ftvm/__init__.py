"""The door through which Nova finds the driver: compute_driver = ftvm.FTVMLibvirtDriver.

Nova looks for drivers below nova.virt only. This package is installed into Nova's own folder beside it; there is no
nova/__init__.py here, and must not be.
"""

from nova_ftvm.cloud.driver import FTVMLibvirtDriver

__all__ = ["FTVMLibvirtDriver"]
