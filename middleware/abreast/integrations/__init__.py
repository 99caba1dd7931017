"""Ready-made effects for what services use. Each module needs its library, and nothing here imports it for you."""
