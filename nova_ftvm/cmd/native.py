"""Native threads, for our own services. Imported before all else: oslo.messaging asks oslo.service for its backend
while it is imported, and the library's default is still eventlet."""

from oslo_service import backend

backend.init_backend(backend.BackendType.THREADING)
