"""Which policy a client runs under."""

from collections.abc import Sequence

from metamoe.client.site import Site
from metamoe.common.audit.policy import DEFAULT, SIMULATION, Policy, kind_of_array, load_policy
from metamoe.common.wire import Artifact


def policy_of(site: Site) -> Policy:
    """The policy of a client's owner, or the one that comes with the product."""
    if site.policy is not None:
        return load_policy(site.policy)
    return SIMULATION if site.simulation else DEFAULT


def permitted(policy: Policy, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """What a reply consists of under a policy: without what is optional and not allowed. What is not optional stays, to be
    refused.
    """
    return [artifact for artifact in artifacts if not artifact.optional or kind_of_array(artifact.name) in policy.allow]
