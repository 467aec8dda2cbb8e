"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("traincert", deadline=None)  # machines are shared: no test asserts a time
settings.load_profile("traincert")
