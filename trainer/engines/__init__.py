"""Engines, which run tasks; `LocalEngine` runs them in processes on this machine."""
