"""What a playbook's tasks came to, a line of JSON each: ansible-core has no such callback of its own."""

from __future__ import annotations

import json
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: results
type: stdout
short_description: A line of JSON for each task
description: For tests.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "results"

    def _tell(self, result: Any, **more: Any) -> None:
        print(json.dumps({"failed": False, "changed": False, **result._result, **more}, default=str))

    def v2_runner_on_ok(self, result: Any) -> None:
        self._tell(result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._tell(result, failed=True)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._tell(result, failed=True)

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._tell(result)
