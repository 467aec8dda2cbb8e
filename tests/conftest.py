"""Settings of all tests."""

import signal

from hypothesis import settings

settings.register_profile("traincert", deadline=None)  # machines are shared: no test asserts a time
settings.load_profile("traincert")

# A shell's background jobs ignore Ctrl-C, and so would all that they start: tests of it must not depend on that.
signal.signal(signal.SIGINT, signal.default_int_handler)
