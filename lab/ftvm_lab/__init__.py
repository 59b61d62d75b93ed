"""The lab: a whole OpenStack with several compute hosts on one machine.

Every machine of the lab is a set of Linux namespaces; every service is the real
one. The lab knows nova_ftvm only by its commands and its configuration files.
"""
