"""The Flower ClientApp: decode, answer, encode."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from metamoe.client.answer import answer
from metamoe.client.egress import guard
from metamoe.client.site import Site, site_of
from metamoe.common.wire import MESSAGE_TYPE, Kind, decode_request, encode_reply


def respond(kind: Kind, content: RecordDict, site: Site) -> RecordDict:
    """A client's reply to the records of one request."""
    return encode_reply(answer(kind, decode_request(kind, content), site))


app = ClientApp(mods=[guard])


@app.query(MESSAGE_TYPE["profile"].partition(".")[2])
def profile(message: Message, context: Context) -> Message:
    """Stage 1."""
    return Message(respond("profile", message.content, site_of(context.node_config, context.run_config)), reply_to=message)


@app.train(MESSAGE_TYPE["expert"].partition(".")[2])
def expert(message: Message, context: Context) -> Message:
    """Stage 2."""
    return Message(respond("expert", message.content, site_of(context.node_config, context.run_config)), reply_to=message)


@app.evaluate(MESSAGE_TYPE["deliver"].partition(".")[2])
def deliver(message: Message, context: Context) -> Message:
    """After stage 3."""
    return Message(respond("deliver", message.content, site_of(context.node_config, context.run_config)), reply_to=message)
