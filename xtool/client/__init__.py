"""Speaking to xtoold: the route table, what crosses the wire, and a client that imports next to nothing."""
