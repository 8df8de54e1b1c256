"""The lab: a real Xen host inside QEMU, for machines that have no Xen.

``image`` builds the disk and kernels, ``guests`` builds test guests, ``machine`` starts, snapshots and stops
one lab, ``ssh`` and ``sync`` reach into it. ``xtool.cli.lab`` is the command line over them.
"""
