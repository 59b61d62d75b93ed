"""Nova in one process: API, scheduler, conductor and compute hosts, with our driver and our filter."""
