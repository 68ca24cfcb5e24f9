from hypothesis import HealthCheck, settings

# A test must not fail because the machine is busy.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")
