"""What differs between kinds of server: how a request is rendered, how its answer is read, what its errors mean."""
