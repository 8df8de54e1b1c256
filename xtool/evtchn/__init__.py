"""Event channels: bind, notify, and dispatch thousands of ports. ``docs/evtchn.md`` shows how."""

from xtool.evtchn.device import EventDevice
from xtool.evtchn.dispatch import Dispatcher, Verdict
from xtool.evtchn.port import EventChannels

__all__ = ["Dispatcher", "EventChannels", "EventDevice", "Verdict"]
