"""Work that a service gives to taskiq: what a shadow sends off stays a shadow's in the worker.

broker = ListQueueBroker(url).with_middlewares(RoleMiddleware())
"""

from __future__ import annotations

from taskiq import TaskiqMessage, TaskiqMiddleware

from abreast.context import extract, inject
from abreast.effects import record

CONTEXT_LABEL = "abreast"


class RoleMiddleware(TaskiqMiddleware):
    """In the service and in the worker. Each task that is sent is recorded as an effect, in both versions."""

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        payload = {"args": message.args, "kwargs": message.kwargs}
        record("task.send", payload, key=message.task_name)
        message.labels[CONTEXT_LABEL] = inject()
        return message

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Each task runs in a context of its own, which ends with it."""
        extract(str(message.labels.get(CONTEXT_LABEL, "")))
        return message
