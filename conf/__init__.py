"""Mark the YAML configuration groups as a package, so that Hydra finds them."""
