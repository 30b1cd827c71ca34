"""Record 82 to the digits of its specification: the network, the training step, the optimizer over a whole schedule."""

import argparse

import pytest
import torch

from tests import oracle

NORMS = {  # gradient norms of the evaluation loss, from the original network in fp64
    "lm_head": 2.406612, "embed": 17.20918, "value_embeds": 5.662006e-2, "bigram_embed": 1.577984e-1,
    "qk_bank": 2.229841, "vo_bank": 3.131139, "mlp_bank": 31.95897, "attn_gate_bank": 8.256646e-2,
    "ve_gate_bank": 2.011658e-3, "smear_gate": 6.212814e-3, "skip_gate": 7.330397e-2, "post_lambdas": 6.2091e-1,
    "resid_lambdas": 7.4354e-1, "x0_lambdas": 4.2561e-1, "bigram_lambdas": 2.1707e-1, "xsa_alphas": 2.314244e-2,
    "scalars": 2.497246e-1, "mudd_w1": 11.80303, "mudd_w2": 9.930709e-1, "mudd_b2": 1.030882e-2,
}


def test_the_network_is_record_82():
    options = argparse.Namespace(record=82, tokens=64, documents="0,20,50,64", short=8, long=24, fill_offset=0,
                                 token_stream=200, yarn=None, script=None)
    found = oracle.network_oracle(options)
    assert found["evaluation_mean"] == pytest.approx(6.42894656, abs=2e-8)
    rows = found["evaluation_rows"]
    assert rows[:4] == pytest.approx([6.76179552, 6.02844763, 6.52449894, 6.50126171], abs=1e-6)
    assert [rows[20], rows[63]] == pytest.approx([5.775856, 6.377983], abs=1e-6)
    assert found["training_sum"] == pytest.approx(711.797815, abs=1e-6)
    assert found["training_rows"][:3] == pytest.approx([11.15728441, 11.06588550, 11.50489859], abs=1e-8)
    assert found["training_rows"][-3:] == pytest.approx([10.55993294, 10.66061566, 6.37798253], abs=1e-8)
    assert found["gradient_norms"] == pytest.approx(NORMS, rel=3e-5)


GRADIENTS = {
    "lm_head": 190.6668, "embed": 196.7202, "value_embeds": 0.907478, "bigram_embed": 0.6064033, "qk_bank": 15.78985,
    "vo_bank": 31.86685, "mlp_bank": 132.2318, "scalars": 4.527898, "post_lambdas": 1.317367, "resid_lambdas": 13.98883,
    "x0_lambdas": 13.65685, "bigram_lambdas": 0.01475507, "xsa_alphas": 0.1811267, "attn_gate_bank": 0.4972752,
    "ve_gate_bank": 0.008964882, "smear_gate": 0.01000452, "skip_gate": 0.5185438, "mudd_w1": 3.695837,
    "mudd_w2": 1.957148, "mudd_b2": 0.8707782,
}

def test_the_first_training_step_is_record_82():
    "Loss and gradients; all twelve steps take minutes: `python -m tests.oracle --steps`."
    model = oracle.small_record(oracle.CONFIG)
    assert oracle.evaluation(model, 0, oracle.CONFIG) == pytest.approx(6.425971, abs=1e-6)
    loss = oracle.network_gradients(model, 0, oracle.CONFIG).item()
    assert loss == pytest.approx(709.5394, abs=1e-4)
    norms = {name: model.get_parameter(name).grad.double().norm().item() for name in oracle.ORDER}
    assert norms == pytest.approx(GRADIENTS, rel=2e-6)


FACTORS = [1, 1, 1, 1.52, 1.291667, 1.063333, 0.94, 0.6766667, 0.4133333, 0.15, 0.15, 0.15]
DISTANCES = {  # after steps 1, 3, 5, ..., from the original optimizer class
    "lm_head": [5.020855, 8.967032, 10.84986, 11.67998, 11.79621, 11.86444],
    "embed": [5.020855, 8.967032, 10.84986, 11.67998, 11.79527, 11.86238],
    "value_embeds": [686.438, 1256.901, 1549.159, 1690.238, 1713.47, 1730.475],
    "bigram_embed": [460.5836, 842.9147, 1038.974, 1133.83, 1149.48, 1160.882],
    "scalars": [0.1959592, 0.3421489, 0.4264699, 0.459696, 0.4666581, 0.4725511],
    "attn_gate_bank": [0.210658, 0.389132, 0.485718, 0.536572, 0.543248, 0.547967],
    "ve_gate_bank": [0.148547, 0.286251, 0.363165, 0.402504, 0.406893, 0.410357],
    "mudd_w1": [0.621699, 1.16043, 1.44739, 1.59352, 1.61964, 1.6406],
}
STATES = {  # counter, norms of both moments, after steps 1, 7 and 11
    "lm_head": [(1, 5.65869, 0.0167735), (4, 6.51844, 0.0452079), (6, 4.7547, 0.050129)],
    "embed": [(0, 0, 0), (4, 6.51844, 0.0452079), (6, 4.75975, 0.0501503)],
    "value_embeds": [(1, 3.64991, 0.0144256), (4, 5.23411, 0.0401741), (6, 5.43246, 0.0548529)],
    "bigram_embed": [(1, 2.44939, 0.00967147), (4, 3.51485, 0.0269635), (6, 3.65202, 0.0368273)],
    "scalars": [(1, 0.00616428, 1.03495e-5), (4, 0.00875774, 3.3798e-5), (6, 0.00967521, 4.75084e-5)],
}
SOME = {"qk_bank": [0, 31], "vo_bank": [0, 9], "mlp_bank": []}  # matrices followed through all steps
PAIR = {"qk_bank": [], "vo_bank": [], "mlp_bank": [6, 7]}  # and through two: they are large
ELEMENTS = {  # place in the chosen matrices -> start, after steps 0, 1, 7, 11
    ("qk_bank", 0, 0, 0): (-0.025756836, -0.026881423, -0.02629263, -0.032866474, -0.032838136),
    ("qk_bank", 1, 100, 200): (-0.0032196045, -0.0017661338, -0.00049586978, 0.01150864, 0.013098355),
    ("vo_bank", 0, 0, 0): (0.029663086, 0.03070599, 0.031537555, 0.041125435, 0.042162545),
    ("vo_bank", 1, 1, 2): (-0.018554688, -0.018459605, -0.018022761, -0.015035205, -0.01471498),
    ("value_embeds", 438, 0): (0.0095214844,) * 5,  # a row without gradients keeps its value to the bit
    ("embed", 438, 0): (-0.012451172, -0.012451172, -0.020507812, -0.006072998, -0.0054626465),
    ("lm_head", 0, 438): (-0.012451172, -0.012451172, -0.020507812, -0.006072998, -0.0056152344),
    ("bigram_embed", 1023, 5): (0.010681152, 0.010681152, 0.609375, 0.32421875, 0.40625),
    ("scalars", 22): (0.52398014, 0.52398014, 0.56398016, 0.668787, 0.67678916),
}


UP, DOWN = (-0.022423498, -0.023897905), (0.0094151869, 0.012214743)  # [10, 20] of layer 3 after steps 0 and 1


def run(matrices, most=None, every=lambda step, model, opt: {}):
    "The optimizer alone at the record's rates on hashed gradients; Polar Express in fp32."
    config = oracle.CONFIG | {"gradients": "prescribed", "lr_scale": 1, "polar": "float32", "matrices": matrices}
    return oracle.steps_oracle(config, most, every)["steps"]


def snapshot(step, model, opt):
    "Elements and states after a step."
    values = {place: oracle.master(model, opt, place[0])[place[1:]].item() for place in ELEMENTS}
    states = {}
    for name in STATES:
        state = opt.state[model.get_parameter(name)]
        states[name] = tuple(float(x) for x in (state["step"], state["exp_avg"].double().norm(),
                                                state["exp_avg_sq"].double().norm())) if state else (0, 0, 0)
    return {"values": values, "states": states}


def test_the_whole_schedule_follows_the_original():
    "Rates, distances, states and single weights in one test: the twelve steps before them take most of the time."
    schedule = run(SOME, every=snapshot)
    assert [step["factor"] for step in schedule] == pytest.approx(FACTORS, rel=1e-6)
    for name, expected in DISTANCES.items():
        found = [step["distances"][name] for step in schedule]
        assert found[1::2] == pytest.approx(expected, rel=5e-6), name
        assert found[0] == 0 and found[2::2] == found[1:-1:2], f"{name} rests at even steps"
    for name, expected in STATES.items():
        for step, state in zip((1, 7, 11), expected, strict=True):
            assert schedule[step]["states"][name] == pytest.approx(state, rel=5e-6), (name, step)
    for place, expected in ELEMENTS.items():
        found = [schedule[step]["values"][place] for step in (0, 1, 7, 11)]
        atol = 1e-6 if place[0] in SOME else 1e-8 + 2e-8 * abs(expected[-1])
        assert found == pytest.approx(expected[1:], rel=0, abs=max(atol, 6e-9)), place


def test_mlp_matrices_move_twice_and_four_times_as_far():
    def look(step, model, opt):
        return {"weights": oracle.master(model, opt, "mlp_bank")[:, 10, 20].tolist()}

    found = [step["weights"] for step in run(PAIR, most=2, every=look)]
    assert [w[0] for w in found] == pytest.approx(UP, rel=0, abs=1e-6)
    assert [w[1] for w in found] == pytest.approx(DOWN, rel=0, abs=1e-6)


def test_other_configurations_run():
    "A YaRN transition, other borders, another fill: the numbers are finite and differ."
    options = argparse.Namespace(record=82, tokens=48, documents="0,1,17,48", short=5, long=11, fill_offset=2,
                                 token_stream=7, yarn="3:7", script=None)
    found = oracle.network_oracle(options)
    assert found["softmax_scale"] == pytest.approx(0.116945957208, rel=1e-6)
    assert torch.isfinite(torch.tensor(list(found["gradient_norms"].values()))).all()
