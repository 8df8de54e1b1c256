"""Xen's core dumps: ELF files as ``docs/misc/dump-core-format.txt`` describes them, notes of
``public/elfnote.h``. Pure layouts; ``toolstack/dumpcore.py`` writes them."""

from __future__ import annotations

from struct import Struct

XEN_ELFNOTE_DUMPCORE_NONE = 0x2000000
XEN_ELFNOTE_DUMPCORE_HEADER = 0x2000001
XEN_ELFNOTE_DUMPCORE_XEN_VERSION = 0x2000002
XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION = 0x2000003

#: What the header note says of the guest: paravirtualised, or not.
MAGIC_PV = 0xF00FEBED
MAGIC_HVM = 0xF00FEBEE
FORMAT_VERSION = 0 << 32 | 1
#: A page that is not there: its frame numbers.
INVALID_PFN = 0xFFFF_FFFF_FFFF_FFFF

ELF_HEADER = Struct("<16sHHIQQQIHHHHHH")
SECTION_HEADER = Struct("<IIQQQQIIQQ")
IDENT = b"\x7fELF\x02\x01\x01\x00" + bytes(8)
ET_CORE = 4
EM_X86_64 = 62
SHT_PROGBITS = 1
SHT_STRTAB = 3
SHT_NOTE = 7
#: Size of a program header, which the ELF header names although there is none.
PROGRAM_HEADER_SIZE = 56

#: Name size, description size, type, name.
NOTE = Struct("<III4s")
#: Magic, number of vCPUs, number of pages, page size.
CORE_HEADER = Struct("<QQQQ")
#: Major, minor, extraversion, compile info, capabilities, changeset, start of Xen's addresses, page size.
XEN_VERSION = Struct("<QQ16s144s1024s64sQQ")
