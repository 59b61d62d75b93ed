"""Nova's fake libvirt, with what it leaves out: the whole XML, transient domains, paused starts.

Rules of libvirt that are kept: XML comes back as it went in; a transient domain is gone when it ends; defineXML with
the uuid of a running domain makes it persistent and leaves it running; a running domain's metadata can be changed.
"""

from xml.etree import ElementTree

from nova.tests.fixtures import libvirt as nova_fake

_START_PAUSED = 1
_INACTIVE = 2


class FaithfulDomain(nova_fake.Domain):
    def __init__(self, connection, xml, running=False, transient=False):
        super().__init__(connection, xml, running=running, transient=transient)
        self.live_xml = xml
        self.next_xml = None if transient else xml

        self.attached = []

    def attachDevice(self, xml):
        self.attached.append(xml)
        return super().attachDevice(xml)

    def XMLDesc(self, flags):
        if flags & _INACTIVE and self.next_xml:
            return self.next_xml
        return self.live_xml

    def isPersistent(self):
        return not self._transient

    def isActive(self):
        return int(self._state in (nova_fake.VIR_DOMAIN_RUNNING, nova_fake.VIR_DOMAIN_PAUSED))

    def createWithFlags(self, flags):
        self.live_xml = self.next_xml or self.live_xml
        super().createWithFlags(flags)
        if flags & _START_PAUSED:
            self._state = nova_fake.VIR_DOMAIN_PAUSED

    #: libvirt's reason of the state; 0: none that it knows.
    reason = 0

    def state(self):
        return [self._state, self.reason]

    def resume(self):
        self._state = nova_fake.VIR_DOMAIN_RUNNING

    def setMetadata(self, metadata_type, metadata, key, uri, flags=0):
        if metadata is not None:
            return  # Nova's own description of the server, which nothing here reads.
        root = ElementTree.fromstring(self.live_xml)
        for child in list(root.find("metadata")):
            if child.tag.startswith(f"{{{uri}}}"):
                root.find("metadata").remove(child)
        self.live_xml = ElementTree.tostring(root, encoding="unicode")


def define(connection, xml):
    root = ElementTree.fromstring(xml)
    here = connection._vms.get(root.findtext("name"))
    if here is not None and here.UUIDString() == root.findtext("uuid") and here.isActive():
        here._transient = False
        here.next_xml = xml
        return here
    made = FaithfulDomain(connection=connection, running=False, transient=False, xml=xml)
    connection._vms[made.name()] = made
    return made


def create(connection, xml, flags):
    if "-incoming" in xml:
        # libvirt starts a QEMU that waits; Nova's fake would reject nothing, so the rule is checked here.
        assert flags & _START_PAUSED, "a waiting QEMU must be started paused"
    made = FaithfulDomain(connection=connection, running=True, transient=True, xml=xml)
    connection._vms[made.name()] = made
    if flags & _START_PAUSED:
        made._state = nova_fake.VIR_DOMAIN_PAUSED
    return made
