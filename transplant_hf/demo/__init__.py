"""The demo: train a recipient and a donor in minutes, on texts that come with Python."""

from .run import DemoReport, DemoSettings, run_demo

__all__ = ["DemoReport", "DemoSettings", "run_demo"]
