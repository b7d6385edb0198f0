"""A long honest backlog: the sweep leaves it alone, and nothing reads it from end to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from itertools import batched
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.shared.celery_app import JobMessage, make_celery, publish
from sluicegate.shared.ids import new_id
from sluicegate.shared.settings import Settings
from sluicegate.workers.claims import Claims
from sluicegate.workers.sweep.republisher import Republisher
from tests.harness import FULL

JOBS = 1_000_000 if FULL else 20_000
CHUNK = 25
QUEUE = "summary.anthropic.bulk"
