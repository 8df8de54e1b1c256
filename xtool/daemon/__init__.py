"""xtoold: the verbs as HTTP/JSON on a Unix socket, long jobs as operations, events as a stream."""
