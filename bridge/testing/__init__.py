"""Training networks for tests. Keep this file empty: every start of pytest imports it."""
