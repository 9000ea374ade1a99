"""Fixtures that every test may ask for."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.s3"]

# A busy machine fails no test. What a test sets by itself counts before this.
settings.register_profile("tessera", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tessera")
