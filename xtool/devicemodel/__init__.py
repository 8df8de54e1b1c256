"""The QEMU device model of an HVM guest.

``spec.py``      what the guest's machine has, as plain values
``argv.py``      that as QEMU's command line (pure)
``process.py``   starting QEMU early, waiting until it is ready, finding and ending it
``qmp.py``       asking it questions (QMP), with deadlines and bounds
"""
