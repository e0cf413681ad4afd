import copy

from common.model.seed import Seed, load_seed


def test_a_fingerprint_sees_everything_that_decides_the_output(seed: Seed, seed_folder) -> None:
    again = load_seed.__wrapped__(str(seed_folder))
    assert again.fingerprint == seed.fingerprint

    def other(part: str) -> Seed:
        model, processor, tokenizer = (copy.deepcopy(x) for x in (seed.model, seed.processor, seed.tokenizer))
        match part:
            case "mean":
                processor.image_mean = [0.4, 0.5, 0.5]
            case "size":
                processor.size = {"height": 16, "width": 16}
            case "activation":
                model.config.vision_config.hidden_act = "gelu"
            case "heads":
                model.config.text_config.num_attention_heads = 4
            case "weight":
                model.logit_scale.data += 1
            case "word":
                tokenizer.add_tokens(["surprise"])
        return Seed("elsewhere", model, tokenizer, processor)

    prints = {part: other(part).fingerprint for part in ("nothing", "mean", "size", "activation", "heads", "weight", "word")}
    assert prints.pop("nothing") == seed.fingerprint
    assert len({seed.fingerprint, *prints.values()}) == 7
