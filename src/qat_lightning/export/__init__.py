"""Int8 networks as files of real runtimes: one file here for each format."""
