"""What `abreast doctor` looks at, one part a module: first facts are gathered, then judged."""

from abreast_sidecar.cli.doctor.check import Check, UnreachableError
from abreast_sidecar.cli.doctor.run import DoctorAddresses, run_checks

__all__ = ["Check", "DoctorAddresses", "UnreachableError", "run_checks"]
