"""Which policy a client runs under."""

from metamoe.client.site import Site
from metamoe.common.audit.policy import DEFAULT, SIMULATION, Policy, load_policy


def policy_of(site: Site) -> Policy:
    """The policy of a client's owner, or the one that comes with the product."""
    if site.policy is not None:
        return load_policy(site.policy)
    return SIMULATION if site.simulation else DEFAULT
