"""Errors of the link between replicas, whatever it is made of."""


class LinkDown(Exception):
    """The store that replicas share cannot be used now. The caller goes on with what it knows."""


class OperationFailed(LinkDown):
    """One operation failed, while the link is up."""
