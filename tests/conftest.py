"""Fixtures that every test may ask for."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.s3"]

# A busy machine fails no test, and two runs of one commit look at the same examples: `make fuzz` is
# for others. What a test sets by itself counts before this.
settings.register_profile(
    "tessera",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tessera")
