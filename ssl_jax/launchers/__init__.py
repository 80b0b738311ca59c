"""What runs a training elsewhere, one module each, found by `ssl_jax.launchers.jobs.engine`.

An engine has these functions; each raises UserError where its commands are not there or refuse:

  add_arguments(group)        its own flags
  describe(order) -> str      exactly what `submit` sends; touches nothing
  submit(order) -> dict       sends it; {'id': ..., and what the other functions need}
  state(job, workdir)         a `jobs.State`
  cancel(job, workdir)        SIGTERM, after which a training saves
  logs(job, workdir, lines, follow)

The contract with what they run is that of `launch.py train --saved_code=75`: 0 is done, 2 is a mistake that starting again does not
mend, everything else is to be started again with the same command, which goes on from the workdir.
"""
