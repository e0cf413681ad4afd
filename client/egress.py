"""The edge of a client: what is not declared in ``common/wire.py`` does not leave, and no exception's text does."""

import traceback

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from client.site import site_of
from common.errors import MetaMoEError
from common.model.seed import load_seed
from common.wire import CLIENT_ERROR_CODE, MESSAGE_TYPE, Kind, decode_reply, decode_request, reply_artifacts


def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: pass a reply on only if it is exactly what was declared; turn every failure into a bare code.

    The reason stays here, in the client's log: an exception's text may quote private data.
    """
    try:
        reply = call_next(message, context)
        kind = kind_of(message.metadata.message_type)
        settings = decode_request(kind, message.content).settings
        decode_reply(reply.content, reply_artifacts(kind, settings, load_seed(settings.seed_model)))
        return reply
    except Exception as error:
        site = site_of(context.node_config, context.run_config)
        site.state.mkdir(parents=True, exist_ok=True)
        with site.log.open("a") as log:
            log.write(f"could not answer {message.metadata.message_type}\n{traceback.format_exc()}\n")
        code = error.exit_code if isinstance(error, MetaMoEError) else MetaMoEError.exit_code
        return Message(Error(CLIENT_ERROR_CODE + code, ""), reply_to=message)


def kind_of(message_type: str) -> Kind:
    """Which of our questions a Flower message type is."""
    return next(kind for kind, name in MESSAGE_TYPE.items() if name == message_type)
