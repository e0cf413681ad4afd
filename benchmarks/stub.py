"""A Flower ClientApp that trains nothing: every message, check and ledger is real, and the numbers in the arrays are drawn."""

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from metamoe.client.egress import guard
from metamoe.client.site import site_of
from metamoe.common.model.seed import load_seed
from metamoe.common.wire import MESSAGE_TYPE, Kind, decode_request, encode_reply, reply_artifacts

app = ClientApp(mods=[guard])


def drawn(kind: Kind, message: Message, context: Context) -> Message:
    """A reply of the declared form; clients of one domain look alike."""
    settings, site = decode_request(kind, message.content).settings, site_of(context.node_config, context.run_config)
    seed = load_seed(settings.seed_model)
    own, domain = np.random.default_rng(site.client), np.random.default_rng(site.client % len(settings.data.domains))
    arrays = {
        artifact.name: (domain.normal(size=artifact.shape) + 0.1 * own.normal(size=artifact.shape)).astype(artifact.dtype)
        for artifact in reply_artifacts(kind, settings, seed)
    }
    if "client" in arrays:
        arrays["client"] = np.array(site.client)
    return Message(encode_reply(arrays), reply_to=message)


@app.query(MESSAGE_TYPE["profile"].partition(".")[2])
def profile(message: Message, context: Context) -> Message:
    """Stage 1."""
    return drawn("profile", message, context)


@app.train(MESSAGE_TYPE["expert"].partition(".")[2])
def expert(message: Message, context: Context) -> Message:
    """Stage 2."""
    return drawn("expert", message, context)


@app.evaluate(MESSAGE_TYPE["deliver"].partition(".")[2])
def deliver(message: Message, context: Context) -> Message:
    """After stage 3."""
    return drawn("deliver", message, context)
