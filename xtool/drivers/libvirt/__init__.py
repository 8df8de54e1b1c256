"""The same verbs through libvirt: for hosts without Xen, and for those where libvirt is in charge.

======================  =========================================================
``uri.py``              which driver ``-H`` names
``honour.py``           what a domain file asks for and the driver cannot give
``domainxml.py``        a domain file as domain XML (``templates``)
``places.py``           vdev names and libvirt's buses
``readxml.py``          libvirt's XML of a running domain
``importxml.py``        anybody's domain XML as a domain file
``link.py``             what is asked of libvirt, in plain values
``direct.py``           ``link`` by libvirt-python in this process
``holder.py``           a process that holds an embedded driver open
``held.py``             ``link`` through that process
``client.py``           the verbs; ``devices.py`` those for devices
``accel.py``            KVM, if it works
======================  =========================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtool.config import DomainConfig
    from xtool.toolstack.api import Client


def open_libvirt(uri: str) -> Client:
    """A client for the driver ``uri`` names. Raises ``UsageError``, ``HostError``."""
    from xtool.drivers.libvirt.client import open_client

    return open_client(uri)


def check_config(config: DomainConfig, uri: str) -> None:
    """Raises ``ConfigError`` with a ``loc`` for each key ``uri``'s driver cannot honour. Opens nothing."""
    from xtool.drivers.libvirt.facts import Facts
    from xtool.drivers.libvirt.honour import check
    from xtool.drivers.libvirt.uri import parse_target

    target = parse_target(uri)
    check(config, Facts(target.kind, target.name))
