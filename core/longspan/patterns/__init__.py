"""Which keys a query may see, as values; nothing here runs attention."""
