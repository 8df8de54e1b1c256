"""What the options that several plugins share mean."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  host:
    description:
      - Where xtool is to carry its verbs out, as its own C(-H) takes it; V(lab), V(lab:NAME), V(ssh://user@host),
        V(unix:/path) of a daemon's socket, or a URI of libvirt's.
      - Without it, on the machine the module runs on. With it, delegate the task to where xtool is to be
        started, which for a controller without Xen is C(localhost).
    type: str
  executable:
    description:
      - The xtool to run; a name that is looked for in E(PATH), or a path.
    type: str
    default: xtool
requirements:
  - xtool on the machine the module runs on
"""
