"""What runs inside Nova's processes: driver, scheduler filter and the API's validators.

The only importer of nova.*. It must behave exactly as Nova does for servers that do not ask for fault tolerance.
"""
