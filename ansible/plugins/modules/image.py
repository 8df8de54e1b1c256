#!/usr/bin/python
"""Ansible module: a disk image on a Xen host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image
short_description: A disk image on a Xen host
description:
  - Fetches an image, verifies its checksum, converts it to the format it is to have, and makes it as large as it is to be.
  - It runs on the machine that is to have the image, and needs no xtool there.
  - An image that is there may be a guest's disk; its contents are left alone, and it is only ever grown.
  - It appears under its name when it is whole, and only its owner reads it. What fails leaves nothing.
version_added: 0.1.0
options:
  path:
    description: The image's full path.
    type: path
    required: true
  state:
    description:
      - V(present), it is there.
      - V(absent), it is not.
    type: str
    choices: [present, absent]
    default: present
  src:
    description:
      - Where it comes from; an HTTP or HTTPS URL, C(file:///path), or a path, on the machine the module runs on.
      - Without it, an image that is not there is made empty, and O(size) says how large.
    type: str
  checksum:
    description: What O(src) has, such as V(sha256:HEX). It is verified before anything is made of it.
    type: str
  format:
    description: The image's format.
    type: str
    choices: [raw, qcow2, vmdk, vpc, vhdx]
    default: raw
  src_format:
    description:
      - The format of O(src). Without it, C(qemu-img) finds it out. An image that refers to other files is refused.
    type: str
    choices: [raw, qcow2, vmdk, vpc, vhdx]
  size:
    description:
      - How large the guest sees it, such as V(20G), at least. A smaller one is grown, a larger one is left as it is.
      - Do not let it be grown while a guest has it.
    type: str
  force:
    description: Make it anew where it is there. What it has is lost. This is always a change.
    type: bool
    default: false
  timeout:
    description: How long a server may keep silent, in seconds.
    type: int
    default: 30
requirements:
  - qemu-img (Debian's qemu-utils) on the machine the module runs on
attributes:
  check_mode:
    support: full
    description: It says what would be done. What O(src) has is not looked at.
author:
  - The xtool authors
"""

EXAMPLES = r"""
- name: Debian's cloud image as web's disk
  xtool.xen.image:
    path: /images/web.img
    src: https://images.example.org/debian-12-generic-amd64.qcow2
    checksum: "sha256:{{ debian_sha256 }}"
    size: 20G

- name: An empty disk
  xtool.xen.image:
    path: /images/data.qcow2
    format: qcow2
    size: 100G
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, of created, grown and removed.
  returned: success
  type: list
  elements: str
  sample: [created]
virtual_size:
  description: How large a guest sees it, in bytes.
  returned: where there is one
  type: int
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible.module_utils.urls import fetch_url

FORMATS = ["raw", "qcow2", "vmdk", "vpc", "vhdx"]
ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "src": {"type": "str"},
    "checksum": {"type": "str"},
    "format": {"type": "str", "choices": FORMATS, "default": "raw"},
    "src_format": {"type": "str", "choices": FORMATS},
    "size": {"type": "str"},
    "force": {"type": "bool", "default": False},
    "timeout": {"type": "int", "default": 30},
}
_CHUNK = 1 << 20


class ImageError(Exception):
    """It cannot be had; the text says why."""


class Image:
    """The image at ``path``. Methods raise ``ImageError``."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module, self._params = module, module.params
        self.path: str = module.params["path"]
        self._folder = os.path.dirname(self.path)
        self.size: int | None = _bytes(module.params["size"])
        if not os.path.isabs(self.path):
            raise ImageError(f"path {self.path} is no full path")

    def qemu_img(self, *words: str) -> str:
        program = self._module.get_bin_path("qemu-img")
        if program is None:
            raise ImageError("there is no qemu-img here: install Debian's qemu-utils")
        rc, out, err = self._module.run_command([program, *words])
        if rc != 0:
            raise ImageError(f"qemu-img {words[0]}: {err.strip() or out.strip()}")
        return str(out)

    def info(self, path: str, form: str | None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.qemu_img("info", "--output=json", *(["-f", form] if form else []), path)
        )
        return found

    def virtual_size(self) -> int:
        """Of the image that is there."""
        # As the format it is to have: what a guest wrote into a raw image may look like another one.
        return self._size_of(self.path)

    def grow(self) -> None:
        self.qemu_img("resize", "-f", self._params["format"], self.path, str(self.size))

    def create(self) -> None:
        """Under its name when it is whole."""
        if not os.path.isdir(self._folder):
            raise ImageError(f"there is no folder {self._folder}")
        if self._params["src"] is None and self.size is None:
            raise ImageError(
                f"{self.path} is not there: src says what it is made of, or size how large it is"
            )
        with self._temporary() as whole:
            if self._params["src"] is None:
                self.qemu_img("create", "-q", "-f", self._params["format"], whole, str(self.size))
            else:
                with self._source() as source:
                    self._convert(source, whole)
                if self.size is not None and self.size > self._size_of(whole):
                    self.qemu_img("resize", "-q", "-f", self._params["format"], whole, str(self.size))
            os.chmod(whole, 0o600)
            os.replace(whole, self.path)

    def _size_of(self, path: str) -> int:
        return int(self.info(path, self._params["format"])["virtual-size"])

    def _convert(self, source: str, whole: str) -> None:
        found = self.info(source, self._params["src_format"])
        form = found["format"]
        if form not in FORMATS:
            raise ImageError(f"{self._params['src']} is a {form} image; known are {', '.join(FORMATS)}")
        data = found.get("format-specific", {}).get("data", {})
        others = [one.get("filename") for one in data.get("extents", ()) if one.get("filename") != source]
        for other in (found.get("backing-filename"), data.get("data-file"), *others):
            if other:
                raise ImageError(f"{self._params['src']} refers to another file, {other}: give a whole image")
        self.qemu_img("convert", "-f", form, "-O", self._params["format"], source, whole)

    @contextmanager
    def _source(self) -> Iterator[str]:
        """A file with what ``src`` has, verified."""
        src = self._params["src"]
        parts = urlsplit(src)
        if parts.scheme in ("", "file"):
            path = os.path.abspath(unquote(parts.path) if parts.scheme else src)
            try:
                with open(path, "rb") as file:
                    self._verify(file)
            except OSError as error:
                raise ImageError(f"cannot read {src}: {error.strerror}") from None
            yield path
            return
        with self._temporary() as path:
            answer, info = fetch_url(self._module, src, timeout=self._params["timeout"])
            if answer is None or info["status"] != 200:
                raise ImageError(f"cannot fetch {src}: {info['msg']}")
            with open(path, "wb") as file:
                while data := answer.read(_CHUNK):
                    file.write(data)
                length = info.get("content-length")
                if length is not None and "content-encoding" not in info and file.tell() != int(length):
                    raise ImageError(f"{src} broke off after {file.tell()} of {length} bytes")
            with open(path, "rb") as file:
                self._verify(file)
            yield path

    def _verify(self, file: BinaryIO) -> None:
        if self._params["checksum"] is None:
            return
        kind, _, wanted = self._params["checksum"].partition(":")
        if kind not in hashlib.algorithms_guaranteed or kind.startswith("shake") or not wanted:
            raise ImageError(f"checksum {self._params['checksum']}: it is as sha256:HEX")
        found = hashlib.new(kind)
        while data := file.read(_CHUNK):
            found.update(data)
        if found.hexdigest() != wanted.lower():
            raise ImageError(
                f"{self._params['src']} has the {kind} {found.hexdigest()}, not {wanted}: "
                "it was changed, or broke off"
            )

    @contextmanager
    def _temporary(self) -> Iterator[str]:
        """The name of a file beside the image, removed at the end."""
        try:
            handle, path = tempfile.mkstemp(prefix=f".{os.path.basename(self.path)}.", dir=self._folder)
        except OSError as error:
            raise ImageError(f"cannot write to {self._folder}: {error.strerror}") from None
        os.close(handle)
        try:
            yield path
        except OSError as error:
            raise ImageError(f"cannot write {self.path}: {error.strerror or error}") from None
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _bytes(text: str | None) -> int | None:
    try:
        return None if text is None else int(human_to_bytes(text))
    except ValueError as error:
        raise ImageError(f"size {text}: {error}") from None


def ensure(image: Image, params: dict[str, Any], check: bool) -> dict[str, Any]:
    """What the module returns. Raises ``ImageError``."""
    there = os.path.exists(image.path)
    actions: list[str] = []
    if params["state"] == "absent":
        if there:
            actions.append("removed")
            if not check:
                os.unlink(image.path)
        return {"changed": there, "actions": actions}
    if not there or params["force"]:
        actions.append("created")
        if not check:
            image.create()
    elif image.size is not None and image.size > image.virtual_size():
        actions.append("grown")
        if not check:
            image.grow()
    more = {"virtual_size": image.virtual_size()} if os.path.exists(image.path) else {}
    return {"changed": bool(actions), "actions": actions, **more}


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    try:
        result = ensure(Image(module), module.params, module.check_mode)
    except ImageError as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{module.params['path']}: {error.strerror or error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
