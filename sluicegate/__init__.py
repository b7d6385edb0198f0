"""Sluicegate: a durable fleet for LLM jobs.

What a producer needs is here; it is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluicegate.producers.async_client import AsyncSluice as AsyncSluice
    from sluicegate.producers.batches import Batch as Batch
    from sluicegate.producers.batches import BatchProgress as BatchProgress
    from sluicegate.producers.batches import BatchResult as BatchResult
    from sluicegate.producers.batches import BatchView as BatchView
    from sluicegate.producers.client import Sluice as Sluice
    from sluicegate.producers.handles import AsyncJobHandle as AsyncJobHandle
    from sluicegate.producers.handles import JobHandle as JobHandle
    from sluicegate.producers.listing import JobSummary as JobSummary
    from sluicegate.producers.reply_channels import AsyncReply as AsyncReply
    from sluicegate.producers.reply_channels import Reply as Reply
    from sluicegate.producers.reply_readers import AsyncReplies as AsyncReplies
    from sluicegate.producers.reply_readers import Replies as Replies
    from sluicegate.producers.submission import JobOptions as JobOptions
    from sluicegate.producers.views import AttemptView as AttemptView
    from sluicegate.producers.views import JobView as JobView
    from sluicegate.shared.budgets import Budget as Budget
    from sluicegate.shared.budgets import Window as Window
    from sluicegate.shared.errors import BudgetExceeded as BudgetExceeded
    from sluicegate.shared.errors import ErrorClass as ErrorClass
    from sluicegate.shared.errors import IdempotencyConflict as IdempotencyConflict
    from sluicegate.shared.errors import IllegalTransition as IllegalTransition
    from sluicegate.shared.errors import InvalidAnswer as InvalidAnswer
    from sluicegate.shared.errors import InvalidJob as InvalidJob
    from sluicegate.shared.errors import JobCancelled as JobCancelled
    from sluicegate.shared.errors import JobEnded as JobEnded
    from sluicegate.shared.errors import JobExpired as JobExpired
    from sluicegate.shared.errors import JobFailed as JobFailed
    from sluicegate.shared.errors import NotFound as NotFound
    from sluicegate.shared.errors import Purged as Purged
    from sluicegate.shared.errors import QueueUnavailable as QueueUnavailable
    from sluicegate.shared.errors import ResultTimeout as ResultTimeout
    from sluicegate.shared.errors import SchemaOutdated as SchemaOutdated
    from sluicegate.shared.errors import SettingsError as SettingsError
    from sluicegate.shared.errors import SluiceError as SluiceError
    from sluicegate.shared.events import Completed as Completed
    from sluicegate.shared.events import Delta as Delta
    from sluicegate.shared.events import Event as Event
    from sluicegate.shared.events import Failed as Failed
    from sluicegate.shared.events import Reset as Reset
    from sluicegate.shared.events import Started as Started
    from sluicegate.shared.jobs import JobError as JobError
    from sluicegate.shared.jobs import Lane as Lane
    from sluicegate.shared.jobs import Result as Result
    from sluicegate.shared.jobs import State as State
    from sluicegate.shared.messages import FilePart as FilePart
    from sluicegate.shared.messages import ImagePart as ImagePart
    from sluicegate.shared.messages import Message as Message
    from sluicegate.shared.messages import ResponseFormat as ResponseFormat
    from sluicegate.shared.messages import TextPart as TextPart
    from sluicegate.shared.messages import Tool as Tool
    from sluicegate.shared.messages import ToolCallPart as ToolCallPart
    from sluicegate.shared.messages import ToolResultPart as ToolResultPart
    from sluicegate.shared.messages import Usage as Usage
    from sluicegate.shared.settings import Settings as Settings

_EXPORTS = {
    "sluicegate.producers.async_client": ("AsyncSluice",),
    "sluicegate.producers.batches": ("Batch", "BatchProgress", "BatchResult", "BatchView"),
    "sluicegate.producers.client": ("Sluice",),
    "sluicegate.producers.handles": ("AsyncJobHandle", "JobHandle"),
    "sluicegate.producers.listing": ("JobSummary",),
    "sluicegate.producers.reply_channels": ("AsyncReply", "Reply"),
    "sluicegate.producers.reply_readers": ("AsyncReplies", "Replies"),
    "sluicegate.producers.submission": ("JobOptions",),
    "sluicegate.producers.views": ("AttemptView", "JobView"),
    "sluicegate.shared.budgets": ("Budget", "Window"),
    "sluicegate.shared.errors": (
        "BudgetExceeded",
        "ErrorClass",
        "IdempotencyConflict",
        "IllegalTransition",
        "InvalidAnswer",
        "InvalidJob",
        "JobCancelled",
        "JobEnded",
        "JobExpired",
        "JobFailed",
        "NotFound",
        "Purged",
        "QueueUnavailable",
        "ResultTimeout",
        "SchemaOutdated",
        "SettingsError",
        "SluiceError",
    ),
    "sluicegate.shared.events": ("Completed", "Delta", "Event", "Failed", "Reset", "Started"),
    "sluicegate.shared.jobs": ("JobError", "Lane", "Result", "State"),
    "sluicegate.shared.messages": (
        "FilePart",
        "ImagePart",
        "Message",
        "ResponseFormat",
        "TextPart",
        "Tool",
        "ToolCallPart",
        "ToolResultPart",
        "Usage",
    ),
    "sluicegate.shared.settings": ("Settings",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [*_MODULE_OF]  # noqa: PLE0604 - all keys are strings


def __getattr__(name: str) -> Any:
    """Import what is asked for: workers and the command line do not need the clients."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
