"""Networks of tasks on top of a backbone."""
