"""What a person runs: the command line, benches, the demo, the doctor and the support matrix."""
