"""taskiq for services that receive shadow requests: a task that a shadow sends runs as a shadow's in the worker.

broker = ListQueueBroker(url).with_middlewares(RoleMiddleware())
"""

from __future__ import annotations

from taskiq import TaskiqMessage, TaskiqMiddleware

from abreast.context import extract, inject
from abreast.effects import record

CONTEXT_LABEL = "abreast"


class RoleMiddleware(TaskiqMiddleware):
    """Pass the role of the request to the worker, and record each task as an effect.

    Add it to the broker in the service and in the worker.
    """

    def pre_send(self, message: TaskiqMessage) -> TaskiqMessage:
        payload = {"args": message.args, "kwargs": message.kwargs}
        record("task.send", payload, key=message.task_name)
        message.labels[CONTEXT_LABEL] = inject()
        return message

    def pre_execute(self, message: TaskiqMessage) -> TaskiqMessage:
        """Restore the context of the sender. taskiq runs each task in a separate context, so it ends with the task."""
        extract(str(message.labels.get(CONTEXT_LABEL, "")))
        return message
