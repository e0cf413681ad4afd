"""Feed-forward sublayers, found by their structure, whatever the model is called.

To support another architecture, add its form to :data:`FORMS`: the names of its linear maps and of its activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from metamoe.common.errors import ModelStructureError


@dataclass(frozen=True)
class Form:
    """Names of a feed-forward sublayer's parts: linear maps up [d -> h], one or a gate and its partner, the linear map down
    [h -> d], and the activation.
    """

    ups: tuple[str, ...]
    down: str
    activation: str

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.ups, self.down)

    def hidden(self, module: nn.Module, ups: Sequence[Tensor]) -> Tensor:
        """What goes down: act(u) of a plain sublayer (CLIP), act(u_gate) u_up of a gated one (LLaMA and its relatives)."""
        gate, *others = ups
        value = getattr(module, self.activation)(gate)
        for other in others:
            value = value * other
        return value


FORMS = (Form(("fc1",), "fc2", "activation_fn"), Form(("gate_proj", "up_proj"), "down_proj", "act_fn"))


def form_of(module: nn.Module) -> Form | None:
    """The form of a feed-forward sublayer; None if it is not one."""
    for form in FORMS:
        *ups, down = (getattr(module, name, None) for name in form.linears)
        if isinstance(down, nn.Linear) and all(
            isinstance(up, nn.Linear) and (up.in_features, up.out_features) == (down.out_features, down.in_features)
            for up in ups
        ):
            return form
    return None


def ffn_paths(model: nn.Module) -> list[str]:
    """Module paths of a seed's feed-forward sublayers, lowest first: those of a CLIP model's vision tower, or of a decoder.

    Raises:
        ModelStructureError: there is none, or they differ in form; names what was found.
    """
    tower = "vision_model" if hasattr(model, "vision_model") else "model"
    modules = list(model.get_submodule(tower).named_modules(prefix=tower)) if hasattr(model, tower) else []
    forms = {path: form for path, module in modules if (form := form_of(module))}
    if len(set(forms.values())) != 1:
        kinds = sorted({type(module).__name__ for _, module in modules}) or [type(model).__name__]
        expected = " or ".join(", ".join(form.linears) for form in FORMS)
        raise ModelStructureError(
            f"no feed-forward sublayers of one form with linear {expected} in {type(model).__name__}; found {', '.join(kinds)}"
        )
    return list(forms)
