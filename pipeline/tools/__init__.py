"""Tools around a config: `convert` writes one from the files and commands of other programs."""
