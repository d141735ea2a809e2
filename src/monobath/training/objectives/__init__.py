"""What is minimised: a module per objective. Each is imported by the runs that need it."""
