import numpy as np
import pytest
import torch

from metamoe.common.config import Settings
from metamoe.common.model.lora import expert_layers, with_lora
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import batch_features, mean_over_samples, router_rows, routing_vectors
from metamoe.server.unify import provenance_loss
from tests.conftest import random_expert, random_features, random_pixels


def test_mean_over_samples_of_a_hand_computed_case_with_a_partial_last_batch() -> None:
    batches = [torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[8.0, 7.0]])]
    assert mean_over_samples(batches).tolist() == [4.0, 3.0]
    with pytest.raises(ValueError, match="no samples"):
        mean_over_samples([])


def test_routing_vectors_are_means_of_the_layer_norm_outputs_in_the_expert(seed: Seed, settings: Settings) -> None:
    """Against transformers' own hidden states, whatever the batches: 3 + 3 + 1 samples."""
    model, pixels = with_lora(seed, settings.lora, random_expert(seed, settings, 0)), random_pixels(7)
    paths = expert_layers(seed, settings.lora)
    vectors = routing_vectors(batch_features(model, paths, part) for part in pixels.split(3))
    layers = model.vision_model.encoder.layers
    with torch.inference_mode():
        states = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        for i, layer in enumerate(layers):
            attended = states[i] + layer.self_attn(layer.layer_norm1(states[i]), attention_mask=None)[0]
            expected = layer.layer_norm2(attended).double().mean(dim=1).mean(dim=0)
            np.testing.assert_allclose(vectors[i], expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(
        routing_vectors(batch_features(model, paths, part) for part in pixels.split(7)), vectors, atol=1e-7
    )
    # No hook is left behind.
    assert not any(layer.mlp._forward_pre_hooks for layer in layers)


def test_rows_of_dot_products_are_the_vectors() -> None:
    vectors = random_features(3, 4)
    rows, biases = router_rows(vectors, None)
    np.testing.assert_array_equal(rows, vectors)
    assert not biases.any()


def test_provenance_loss_of_a_hand_computed_case() -> None:
    pi = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.9, 0.1], [0.1, 0.9]]])
    clients = torch.tensor([1, 0])
    expected = -(np.log((0.5 + 0.75) / 2) + np.log(0.5)) / 2
    assert provenance_loss(pi.log(), clients).item() == pytest.approx(expected, rel=1e-6)
    mask = torch.tensor([[True, True], [True, False]])
    expected = -(np.log((0.5 + 0.75) / 2) + np.log(0.9)) / 2
    assert provenance_loss(pi.log(), clients, mask).item() == pytest.approx(expected, rel=1e-6)
