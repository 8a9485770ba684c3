"""Values that all the rest speaks of: problems, devices, patterns as such, backends and the choice among them."""
