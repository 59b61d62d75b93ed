"""The manager's memory: pairs and hosts. Frozen records leave this room, never rows.

`records` names them, `store` reads and writes them, `schema` owns the tables, `migrations` their history.
"""
