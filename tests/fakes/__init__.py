"""Fakes for the tests of several packages: servers, clients, clocks, requests.

`self_signed.pem` is a throw-away private key with its certificate, for TLS on loopback.
"""
