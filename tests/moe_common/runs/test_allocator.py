"""The allocator setting is taken where there is glibc and harmless elsewhere."""

import ctypes
import platform

import pytest

from moe_common.runs.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_glibc_takes_the_setting():
    assert keep_freed_memory() is True


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert keep_freed_memory() is False
