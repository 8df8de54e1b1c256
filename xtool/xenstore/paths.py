"""Where things are in xenstore: pure functions, one per place. Source: ``docs/misc/xenstore-paths.pandoc``.

A backend's folder lies under the domain that runs it; the frontend's under the guest::

    /local/domain/<backend_domid>/backend/<kind>/<frontend_domid>/<devid>
    /local/domain/<frontend_domid>/device/<kind>/<devid>
"""

from __future__ import annotations

INTRODUCE_DOMAIN = "@introduceDomain"
RELEASE_DOMAIN = "@releaseDomain"


def join(*parts: str | int) -> str:
    """``join("/a", "b", 3)`` -> ``"/a/b/3"``; a single ``/`` in front is kept."""
    return "/" + "/".join(text for part in parts if (text := str(part).strip("/")))


def parent(path: str) -> str:
    """``/a/b`` -> ``/a``; ``/a`` and ``/`` -> ``/``."""
    return path.rpartition("/")[0] or "/"


def is_below(path: str, root: str) -> bool:
    """Whether ``path`` is ``root`` or below it."""
    return root == "/" or path == root or path.startswith(root + "/")


def domain(domid: int) -> str:
    return f"/local/domain/{domid}"


def vm(uuid: str) -> str:
    return f"/vm/{uuid}"


def libxl(domid: int) -> str:
    """What xl and other libxl users read about a domain; private to the control domain."""
    return f"/libxl/{domid}"


def frontend(domid: int, kind: str, devid: int) -> str:
    return f"/local/domain/{domid}/device/{kind}/{devid}"


def backend(backend_domid: int, kind: str, frontend_domid: int, devid: int) -> str:
    return f"/local/domain/{backend_domid}/backend/{kind}/{frontend_domid}/{devid}"


def libxl_device(domid: int, kind: str, devid: int) -> str:
    return f"/libxl/{domid}/device/{kind}/{devid}"


def console(domid: int) -> str:
    """The first PV console. It alone does not live under ``device/``."""
    return f"/local/domain/{domid}/console"


def serial(domid: int, number: int = 0) -> str:
    """An emulated serial port of an HVM domain."""
    return f"/local/domain/{domid}/serial/{number}"


def store(domid: int) -> str:
    return f"/local/domain/{domid}/store"


def device_model(domid: int, model_domid: int = 0) -> str:
    return f"/local/domain/{model_domid}/device-model/{domid}"


def device_model_pid(domid: int) -> str:
    """There is one if a QEMU was started for the domain; libxl looks there, too."""
    return f"{domain(domid)}/image/device-model-pid"
