"""Mark the job templates as a package, so that the launcher finds them."""
