"""Load client, scenarios and results of `gateway bench`.

Imports nothing that serves requests: what it measures is measured from outside, over HTTP.
"""
