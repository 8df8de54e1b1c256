"""XML as virsh prints it becomes a domain file, and what is lost is said; hostile XML is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.cli import app
from xtool.config import parse_config
from xtool.drivers.libvirt.importxml import import_xml
from xtool.errors import ConfigError

QEMU = """<domain type='kvm' id='7'>
  <name>web</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <title>The web server</title>
  <metadata>
    <os:info xmlns:os="http://example.org/os"><os:id>debian12</os:id></os:info>
  </metadata>
  <memory unit='KiB'>2097152</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static' cpuset='0-3' current='1'>2</vcpu>
  <resource><partition>/machine</partition></resource>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
    <boot dev='fd'/>
  </os>
  <features><acpi/><apic/><vmport state='off'/></features>
  <cpu mode='host-passthrough' check='none' migratable='on'/>
  <clock offset='utc'>
    <timer name='rtc' tickpolicy='catchup'/>
    <timer name='hpet' present='no'/>
  </clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>coredump-destroy</on_crash>
  <pm><suspend-to-mem enabled='no'/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/var/lib/libvirt/images/web.qcow2' index='1'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/vg/data'/>
      <target dev='sdb' bus='usb'/>
      <readonly/>
    </disk>
    <disk type='volume' device='disk'>
      <source pool='p' volume='v'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <controller type='usb' index='0' model='qemu-xhci' ports='15'/>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='scsi' index='0' model='virtio-scsi'/>
    <interface type='network'>
      <mac address='52:54:00:12:34:56'/>
      <source network='default' portid='x' bridge='virbr0'/>
      <target dev='vnet3'/>
      <model type='virtio'/>
    </interface>
    <interface type='direct'>
      <source dev='eth0' mode='bridge'/>
    </interface>
    <serial type='pty'><source path='/dev/pts/4'/><target type='isa-serial' port='0'/></serial>
    <console type='pty' tty='/dev/pts/4'><target type='serial' port='0'/></console>
    <channel type='unix'>
      <source mode='bind' path='/run/libvirt/qemu/channel/target/domain-7-web/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <input type='tablet' bus='usb'/>
    <input type='mouse' bus='ps2'/>
    <graphics type='vnc' port='5903' autoport='no' listen='0.0.0.0'>
      <listen type='address' address='0.0.0.0'/>
    </graphics>
    <graphics type='spice' autoport='yes'/>
    <video><model type='virtio' heads='1' primary='yes'/></video>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'/>
</domain>
"""

XEN_PV = """<domain type='xen'>
  <name>db</name>
  <memory>524288</memory>
  <vcpu>2</vcpu>
  <cputune><vcpupin vcpu='0' cpuset='1'/><vcpupin vcpu='1' cpuset='2-3'/></cputune>
  <os>
    <type arch='x86_64' machine='xenpv'>linux</type>
    <kernel>/boot/vmlinuz</kernel>
    <initrd>/boot/initrd.img</initrd>
    <cmdline>root=/dev/xvda1 console=hvc0</cmdline>
  </os>
  <clock offset='utc' adjustment='reset'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>rename-restart</on_reboot>
  <on_crash>preserve</on_crash>
  <devices>
    <disk type='block' device='disk'>
      <driver name='phy'/>
      <source dev='/dev/vg/db'/>
      <target dev='xvda1' bus='xen'/>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/images/data.qcow2'/>
      <target dev='xvdb' bus='xen'/>
    </disk>
    <controller type='xenbus' index='0' maxGrantFrames='64'/>
    <interface type='bridge'>
      <mac address='00:16:3e:5d:c7:9e'/>
      <source bridge='xenbr0'/>
      <ip address='192.168.0.9' family='ipv4'/>
      <script path='vif-bridge'/>
      <target dev='vif3.0'/>
      <bandwidth><inbound average='5'/><outbound average='1000' peak='2000'/></bandwidth>
    </interface>
    <console type='pty'><target type='xen' port='0'/></console>
    <input type='mouse' bus='xen'/>
    <graphics type='vnc' port='-1'/>
    <hostdev mode='subsystem' type='pci' managed='yes'><source><address bus='0x1'/></source></hostdev>
  </devices>
</domain>
"""


def test_a_qemu_domain() -> None:
    config, left_out = import_xml(QEMU)
    plain = config.to_dict()
    del plain["disk"]
    assert plain == {
        "name": "web",
        "type": "hvm",
        "uuid": "4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
        "memory": 1024,
        "maxmem": 2048,
        "maxvcpus": 2,
        "cpus": "0-3",
        "boot": "c",
        "vif": [{"mac": "52:54:00:12:34:56", "bridge": "virbr0"}],
        "channel": [{"name": "org.qemu.guest_agent.0", "connection": "socket"}],
        "hdtype": "ahci",
        "serial": ["pty"],
        "vnc": True,
        "vnclisten": "0.0.0.0",
        "vncdisplay": 3,
        "vga": "none",
        "usb": True,
        "usbdevice": ["tablet"],
        "hpet": False,
        "on_crash": "coredump-destroy",
    }
    assert config.vcpus == 1
    disks = {disk.vdev: disk for disk in config.disks}
    assert set(disks) == {"xvda", "xvdb", "hda"} and disks["xvda"].discard and disks["xvda"].format == "qcow2"
    assert disks["xvdb"].readonly and disks["xvdb"].target == "/dev/vg/data" and disks["hda"].cdrom
    said = "\n".join(left_out)
    for lost in (
        *("title The web server", "metadata/info", "os/boot[2] dev=fd", "features/vmport state=off"),
        *("clock/timer[1] name=rtc", "pm", "devices/disk[1]/driver cache=none"),
        *("disk sdb on usb: it is xvdb now", "devices/disk[3] type=volume", "model=virtio-scsi"),
        *("source network=default", "interface[2] type=direct", "channel[2] type=spicevmc"),
        *("graphics[2] type=spice", "devices/video", "devices/rng model=virtio", "emulator /usr/bin"),
    ):
        assert lost in said, f"{lost!r} is not told:\n{said}"
    assert parse_config(config.to_yaml()) == config


def test_a_xen_pv_domain() -> None:
    config, left_out = import_xml(XEN_PV)
    assert (config.type, config.memory >> 20, config.vcpus, config.cpus) == ("pv", 512, 2, ("1", "2-3"))
    assert (config.kernel, config.cmdline) == ("/boot/vmlinuz", "root=/dev/xvda1 console=hvc0")
    assert (config.on_reboot, config.on_crash, config.max_grant_frames) == ("rename-restart", "preserve", 64)
    assert [(d.vdev, d.target, d.format) for d in config.disks] == [
        ("xvda1", "/dev/vg/db", "raw"),
        ("xvdb", "/images/data.qcow2", "qcow2"),
    ]
    (vif,) = config.vifs
    assert (vif.bridge, vif.ip, vif.script, vif.vifname, vif.rate) == (
        *("xenbr0", "192.168.0.9", "vif-bridge", None, "8192000b/s"),
    )
    assert sorted(line.split()[0] for line in left_out) == [
        "clock",
        "devices/graphics",
        "devices/hostdev",
        "devices/interface/bandwidth/inbound",
        "devices/interface/bandwidth/outbound",
    ]


def test_boot_order_of_devices() -> None:
    xml = QEMU.replace("<boot dev='hd'/>", "").replace("<boot dev='fd'/>", "")
    xml = xml.replace("<target dev='vda' bus='virtio'/>", "<target dev='vda' bus='virtio'/><boot order='2'/>")
    xml = xml.replace("<target dev='vnet3'/>", "<target dev='vnet3'/><boot order='1'/>")
    assert import_xml(xml).config.boot == "nc"


BOMB = """<?xml version="1.0"?><!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<domain type='xen'><name>&b;</name></domain>"""
EXTERNAL = (
    """<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain type='xen'><name>&x;</name></domain>"""
)


@pytest.mark.parametrize("text", [BOMB, EXTERNAL, "<!DOCTYPE domain><domain/>"])
def test_no_dtd_and_no_entities(text: str) -> None:
    with pytest.raises(ConfigError, match="which is refused"):
        import_xml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no XML"),
        ("<domain>", "no XML"),
        ("\0", "no XML"),
        ("<network/>", "no domain"),
        ("<domain type='lxc'><os><type>exe</type></os></domain>", "none that xtool can run"),
        ("<domain type='kvm'><os><type>linux</type></os></domain>", "none that xtool can run"),
        ("<domain type='xen'><os><type>hvm</type></os></domain>", "name"),
        ("<domain type='xen'><name>a</name><os><type>hvm</type></os></domain>", "memory"),
        (
            "<domain type='xen'><name>a/b</name><memory>65536</memory><os><type>hvm</type></os></domain>",
            "slash",
        ),
        ("<domain>" + "<a>" * 2000 + "</a>" * 2000 + "</domain>", "nested too deeply"),
        ("<domain>" + " " * (1 << 20) + "</domain>", "too large"),
    ],
)
def test_what_is_no_domain(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_xml(text)


def test_an_error_shows_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        import_xml("<domain>\n  <name>a</nam>\n</domain>", "web.xml")
    assert (caught.value.file, caught.value.line) == (
        "web.xml",
        2,
    ) and caught.value.source == "  <name>a</nam>"


@given(st.data())
def test_damaged_xml_is_imported_or_refused(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([QEMU, XEN_PV]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 40))
        text = text[:start] + data.draw(st.text("<>'/=ax0&; -", max_size=10)) + text[start + length :]
    try:
        config = import_xml(text).config
    except ConfigError:
        return
    assert parse_config(config.to_yaml()) == config


@given(st.data())
def test_any_value_is_imported_or_refused(data: st.DataObject) -> None:
    import re

    text = data.draw(st.sampled_from([QEMU, XEN_PV]))
    values = [
        match.span(1) for match in re.finditer(r"='([^']*)'|>([^<>\s]+)<", text) if match[1] is not None
    ]
    start, end = data.draw(st.sampled_from(values))
    new = data.draw(
        st.one_of(st.sampled_from(["", "-1", "9" * 30, "no", "x,y", "٣"]), st.text("abc019/:-. "))
    )
    try:
        config = import_xml(text[:start] + new + text[end:]).config
    except ConfigError:
        return
    assert parse_config(config.to_yaml()) == config


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "web.xml"
    file.write_text(XEN_PV)
    assert app.main(["config", "import", str(file)]) == 0
    out, err = capsys.readouterr()
    assert parse_config(out) == import_xml(XEN_PV).config
    assert err.count("not carried over: ") == 5 and "devices/hostdev" in err
    yaml = tmp_path / "web.yaml"
    yaml.write_text(out)
    assert app.main(["config", "export", "--format", "yaml", str(yaml)]) == 0
    assert capsys.readouterr().out == out
    assert app.main(["config", "export", str(yaml), "--driver", "qemu"]) == 3
    assert "type: pv needs Xen" in capsys.readouterr().err
    assert app.main(["config", "export", str(yaml), "--format", "toml"]) == 2
