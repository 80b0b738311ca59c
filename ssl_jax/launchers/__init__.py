"""Engines, which run a training elsewhere: one module each, which `ssl_jax.launchers.jobs.engine` imports.

An engine has these functions; each raises UserError where the programs of the engine are not installed or fail:

  add_arguments(group)        its own flags
  describe(request) -> str    exactly what `submit` sends; changes nothing
  submit(request) -> dict     sends it; {'id': ..., and what the other functions need}
  state(job, workdir)         a `jobs.JobState`
  cancel(job, workdir)        SIGTERM, after which a training saves
  logs(job, workdir, lines, follow)

All engines run `launch.py train --saved_code=75`. Exit code 0 means done and 2 means bad input, which a restart does not repair.
After any other exit code the engine restarts the same command, which resumes from the workdir.
"""
