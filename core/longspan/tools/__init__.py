"""What a person runs: the command line, benches, the demo and the doctor."""
