"""One compile: from Dynamo's graph to a callable."""
