"""Assertions of the harness say what they saw."""

import pytest

pytest.register_assert_rewrite("tests.harness")
