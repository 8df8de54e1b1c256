"""Write ``reference.json``: layouts by Xen release, from the public headers at each release's tag.

Run by ``scripts/abi-reference``. Per release: the interface versions, and for each structure its size and
``member: [offset, size]`` for every member that any of our layouts of it has.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import oracle

from xtool.abi import domctl

RELEASES = {
    "4.17": "RELEASE-4.17.5",
    "4.18": "RELEASE-4.18.5",
    "4.19": "RELEASE-4.19.4",
    "4.20": "RELEASE-4.20.3",
    "4.21": "RELEASE-4.21.1",
    "4.22": "RELEASE-4.22.0",
}

#: What a domctl- or sysctl-speaking toolstack depends on: versioned, so free to change between releases.
STRUCTS = (
    "struct xen_domctl", "struct xen_domctl_createdomain", "struct xen_domctl_getdomaininfo",
    "struct xen_arch_domainconfig", "struct xen_domctl_getvcpuinfo", "struct xen_domctl_vcpuaffinity",
    "struct xen_domctl_vcpucontext", "struct xen_domctl_cpu_policy", "struct xen_domctl_tsc_info",
    "struct xen_domctl_hvmcontext", "struct xen_sysctl", "struct xen_sysctl_physinfo",
    "struct xen_sysctl_getdomaininfolist", "struct xen_sysctl_cpu_policy", "struct xen_sysctl_readconsole",
    "struct xen_domctl_scheduler_op", "struct xen_domctl_schedparam_vcpu", "struct xen_domctl_sendtrigger",
    "struct xen_domctl_getpageframeinfo3", "struct xen_domctl_max_mem", "struct xen_sysctl_cputopo",
    "struct xen_sysctl_cputopoinfo", "struct xen_sysctl_cpupool_op", "struct xen_sysctl_scheduler_op",
    "struct xen_sysctl_debug_keys",
)  # fmt: skip


def our_layouts(c_name: str) -> list[type[ctypes.Structure]]:
    if c_name == "struct xen_domctl_createdomain":
        return list(dict.fromkeys(domctl.CREATEDOMAIN.values()))
    return [cls for cls in oracle.layouts() if c_name == cls.C_NAME]  # type: ignore[attr-defined]


def ask(headers: Path) -> dict[str, object]:
    wanted = {
        name: dict.fromkeys(m for cls in our_layouts(name) for m in oracle.members(cls).values())
        for name in STRUCTS
        if our_layouts(name)
    }
    versions = ["XEN_DOMCTL_INTERFACE_VERSION", "XEN_SYSCTL_INTERFACE_VERSION"]
    questions = list(versions)
    for name, members in wanted.items():
        questions.append(oracle.size_of(name))
        for member in members:
            questions += [oracle.offset_of(name, member), oracle.member_size(name, member)]
    answers = oracle.evaluate(questions, headers)
    structs = {
        name: {
            "size": answers[oracle.size_of(name)],
            "members": {
                m: [answers[oracle.offset_of(name, m)], answers[oracle.member_size(name, m)]]
                for m in members
                if oracle.offset_of(name, m) in answers
            },
        }
        for name, members in wanted.items()
    }
    return {"domctl": answers[versions[0]], "sysctl": answers[versions[1]], "structs": structs}


def main(repository: str) -> None:
    reference = {}
    for release, tag in RELEASES.items():
        with tempfile.TemporaryDirectory() as folder:
            git = ["git", "-C", repository, "archive", tag, "xen/include/public"]
            archive = subprocess.run(git, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            reference[release] = ask(Path(folder, "xen/include/public"))
            print(f"{release} ({tag}): domctl {reference[release]['domctl']:#x}", file=sys.stderr)
    target = Path(__file__).with_name("reference.json")
    target.write_text(_one_line_per_struct(reference))


def _one_line_per_struct(reference: dict[str, dict[str, object]]) -> str:
    releases = []
    for release, table in reference.items():
        structs = table["structs"]
        assert isinstance(structs, dict)
        lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(s)}" for name, s in structs.items())
        head = f'    "domctl": {table["domctl"]}, "sysctl": {table["sysctl"]},\n    "structs": {{'
        releases.append(f'  "{release}": {{\n{head}\n{lines}\n    }}\n  }}')
    return "{\n" + ",\n".join(releases) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1])
