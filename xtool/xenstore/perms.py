"""xenstore permissions, where users of the client look for them; see ``xtool.proto.xsperms``."""

from xtool.proto.xsperms import PRIVATE, Perm, Perms, may_read, may_write, owned_by

__all__ = ["PRIVATE", "Perm", "Perms", "may_read", "may_write", "owned_by"]
