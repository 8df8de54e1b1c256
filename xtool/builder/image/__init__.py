"""Kernels and ramdisks: what a file holds, made ready for the builder to copy from.

``load_kernel`` unwraps a Linux bzImage or a compressed ELF, reads the ELF program headers and the Xen
notes, and returns a ``KernelImage`` over one read-only mapping. See ``docs/images.md``.
"""

from xtool.builder.image.cache import KernelCache
from xtool.builder.image.elf import Segment
from xtool.builder.image.load import load_kernel, load_ramdisk
from xtool.builder.image.model import KernelImage, Ramdisk
from xtool.builder.image.notes import FEATURES, XenNotes

__all__ = [
    "FEATURES",
    "KernelCache",
    "KernelImage",
    "Ramdisk",
    "Segment",
    "XenNotes",
    "load_kernel",
    "load_ramdisk",
]
