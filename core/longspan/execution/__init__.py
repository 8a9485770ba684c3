"""Running a layout on tensors, forward and joint backward, inside one autograd node."""
