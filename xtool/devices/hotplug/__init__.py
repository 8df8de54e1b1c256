"""What the host's kernel must be told so that its backends work: disks, interfaces, scripts.

``port.py``     what the toolstack asks for; ``linux.py`` does it, ``xtool.fake.hotplug`` plays it
``loop.py``     files as block devices
``bridge.py``   interfaces on bridges, by netlink (``link.py``)
``tap.py``      tap devices, for the interfaces that a process of ours serves
``scripts.py``  Xen's own hotplug scripts, for those who have written some
``sharing.py``  which file or device a path really is
"""
