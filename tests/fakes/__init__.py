"""Stand-ins for what the gateway's parts meet. `self_signed.pem` is a throw-away key and its certificate, for TLS on loopback."""
