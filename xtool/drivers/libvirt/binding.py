"""libvirt-python, and its errors as ours.

It is ``libvirt-python`` on PyPI, which is built on the spot and wants libvirt's headers, and
``python3-libvirt`` in Debian, which needs nothing; the second is found from a virtual environment too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from xtool.errors import (
    ConfigError,
    DeviceError,
    DomainError,
    DomainExistsError,
    DomainNotFoundError,
    HostError,
    PrivilegeError,
    UnsupportedError,
    XtoolError,
)
from xtool.systempython import system_module


def binding() -> ModuleType:
    """The module ``libvirt``. Raises ``HostError`` with what to install."""
    module = system_module(
        ("libvirtmod", "libvirt"), "libvirt's", "python3-libvirt, or xtool[libvirt] by pip"
    )
    # Else libvirt prints each error as well.
    module.registerErrorHandler(lambda *_: None, None)
    return module


@contextmanager
def translated(libvirt: Any, what: str) -> Iterator[None]:
    """Raise libvirt's errors as ours; ``what`` was being done: "create web"."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(libvirt, error, what) from None


def translate(libvirt: Any, error: Any, what: str) -> XtoolError:
    code = error.get_error_code()
    text = (error.get_error_message() or str(error)).strip()
    message = f"libvirt cannot {what}: {text}"
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return DomainNotFoundError(message, hint="xtool list shows those there are")
    if code in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
        return UnsupportedError(message, hint="this driver of libvirt's cannot do it")
    if code in (libvirt.VIR_ERR_CONFIG_UNSUPPORTED, libvirt.VIR_ERR_XML_INVALID_SCHEMA):
        return ConfigError(message)
    if code == libvirt.VIR_ERR_DEVICE_MISSING:
        return DeviceError(message)
    if code in (
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_OPERATION_DENIED,
    ):
        return PrivilegeError(message, hint="run it as root, or join the group libvirt")
    if any(word in text for word in ("already exists", "already active", "already defined")):
        return DomainExistsError(message, hint="choose another name (--set name=...), or xtool destroy it")
    if "libvirt-qemu" in text and "user" in text:
        return HostError(
            f"{message}: as root, libvirt wants the user its guests could run as",
            hint="as root: useradd --system --gid kvm --no-create-home libvirt-qemu; "
            "groupadd --system libvirt-qemu",
        )
    if what.startswith("open ") or code in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_RPC):
        return HostError(message, hint="is libvirtd running there? -H qemu: needs none")
    return DomainError(message)
